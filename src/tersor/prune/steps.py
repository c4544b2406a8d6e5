"""Structured pruning as a step of a recipe."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.report import FrozenPart, PrunedFamily, Pruning
from tersor.core.step import Kind, Step
from tersor.core.task import Role, Task
from tersor.graph import Family
from tersor.probe import Need, multiply_accumulates, reestimate_batchnorm
from tersor.prune.measured import calibration_batches, check_labels, loss_of
from tersor.prune.outcome import Outcome
from tersor.prune.structure import Structure
from tersor.prune.structured import PruneReport, structured

EXAMPLE_BATCHES = (2, 3)  # two sizes: what follows the batch is not what follows the model
REASONS_SHOWN = 3


@dataclass(frozen=True)
class Pruned:
    """A pruned module: the report of the function, and what of it goes into the run's report."""

    report: Outcome
    pruning: Pruning

    def notes(self) -> list[str]:
        """For the history."""
        return [*summary(self.pruning), *self.report.notes]


class Cutting(Step):
    """What steps that cut something out have in common.

    They look at `samples` examples of the calibrate split if they measure something, and re-estimate BatchNorm
    statistics on them wherever the task has that split.
    """

    kind: ClassVar[Kind] = "prune"

    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    instead: ClassVar[str]  # a criterion that does without labels

    @property
    @abstractmethod
    def judged(self) -> tuple[str, frozenset[Need]]:
        """The criterion, and what it takes from data."""

    @abstractmethod
    def cut(self, module: nn.Module, whole: Whole, context: Context, **given: Any) -> Pruned:
        """Prunes `module` in place.

        Args:
            module: A copy of the candidate's.
            whole: The module before.
            context: Of the step.
            **given: Examples, data, loss: as the functions take them.
        """

    def prune(self, module: nn.Module, context: Context) -> Pruned:
        """Prunes `module` in place, on the examples of the context's task.

        Raises:
            CoverageError: if nothing can be pruned.
            DataError: if there is no calibrate split, or no labels in it, and something that is measured needs them.
        """
        batches = self.batches(context)
        criterion, needs = self.judged
        check_labels(batches or (), needs, self.name, criterion, instead=self.instead)
        given = {"example_inputs": examples(context.task), "data": batches, "loss": loss_of(context.task)}
        return self.cut(module, Whole.of(module, context), context, inplace=True, **given)

    def batches(self, context: Context) -> list[Batch] | None:
        """What is measured on, and BatchNorm statistics are averaged over; None without a calibrate split."""
        if not self.needs and context.task.get("calibrate") is None:
            return None
        return calibration_batches(context, self.name, samples=self.samples, batch_size=self.batch_size)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Prunes a copy; masks shrink along with their parameters."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        done = self.prune(fresh.module, context)
        cut = fresh.after(done.report.surgery, fresh.module)
        self.hold_masks(cut, context)
        seconds = time.perf_counter() - started
        return cut.record(self.name, self.model_dump(mode="json"), seconds, done.notes(), done.pruning)

    def hold_masks(self, cut: Candidate, context: Context) -> None:
        """Where pruning changes what stays, masked weights are zero again; nothing does by default."""


class Structured(Cutting, Structure):
    """Removes whole channels, heads, neurons and hidden units, and proves that nothing broke; settings: `Structure`."""

    name: ClassVar[str] = "prune.structured"
    instead: ClassVar[str] = "wanda"

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, where something is measured."""
        return frozenset({"calibrate"}) if self.needs_evidence else frozenset()

    @property
    def judged(self) -> tuple[str, frozenset[Need]]:
        """As `Cutting.judged`; compensation takes its part as well."""
        return self.criterion, self.needs_evidence

    def cut(self, module: nn.Module, whole: Whole, context: Context, **given: Any) -> Pruned:
        """As `Cutting.cut`."""
        report = structured(module, **given, **for_examples(self))
        return Pruned(report, pruning_of(report, whole, macs_of(module, context)))

    def hold_masks(self, cut: Candidate, context: Context) -> None:
        """Least squares knows nothing of masks."""
        if cut.masks and self.compensate:
            apply_masks(cut.module, cut.masks)
            reestimate_batchnorm(cut.module, self.batches(context) or ())


@dataclass(frozen=True)
class Whole:
    """What a report tells of a module before anything was cut out.

    Attributes:
        macs: Multiply-accumulates at batch 1.
        sizes: Parameter path -> number of entries.
        layers: Modules with parameters of their own, in the model's order.
    """

    macs: int
    sizes: Mapping[str, int]
    layers: list[str]

    @classmethod
    def of(cls, module: nn.Module, context: Context) -> Whole:
        """Looks at a module."""
        sizes = {path: parameter.numel() for path, parameter in module.named_parameters()}
        return cls(macs_of(module, context), sizes, list(dict.fromkeys(_owner(path) for path in sizes)))


def examples(task: Task) -> list[Any]:
    """Example inputs as `structured` takes them, at two batch sizes; positional or by keyword, as the task has them."""
    batches = [task.example(size) for size in EXAMPLE_BATCHES]
    return [batch.kwargs or batch.args for batch in batches]


def pruning_of(report: PruneReport, whole: Whole, macs_after: int) -> Pruning:
    """What the run's report keeps of a pruning.

    Args:
        report: What was done.
        whole: The module before.
        macs_after: At batch 1.
    """
    cuts = {cut.name: cut for cut in report.families}
    families = [family for family in report.coupling.families if family.name in cuts]
    return told(
        report,
        whole,
        macs_after,
        amount=report.amount,
        touched=touched(families),
        families=[
            PrunedFamily(
                name=family.name,
                kind=family.kind,
                units=family.size,
                kept=cuts[family.name].kept,
                layers=list(dict.fromkeys(_owner(path) for path in touched([family]))),
            )
            for family in families
        ],
        unused=report.unused,
    )


def told(
    report: Outcome,
    whole: Whole,
    macs_after: int,
    *,
    amount: float,
    touched: Iterable[str],
    families: list[PrunedFamily],
    unused: Iterable[str] = (),
) -> Pruning:
    """What the run's report keeps of any pruning.

    Args:
        report: What was done.
        whole: The module before.
        macs_after: At batch 1.
        amount: Share of the units that went.
        touched: Paths of the parameters that some unit owns a part of.
        families: Of units.
        unused: Parameters that the examples never reached.
    """
    return Pruning(
        parameters_before=report.params_before,
        parameters_after=report.params_after,
        macs_before=whole.macs,
        macs_after=macs_after,
        amount=amount,
        coverage=coverage(touched, whole.sizes),
        families=families,
        frozen=[FrozenPart(name=item.name, reason=item.reason) for item in report.frozen],
        unused=list(unused),
        max_error=report.max_error,
        layers=whole.layers,
    )


def touched(families: Iterable[Family]) -> list[str]:
    """Paths of the parameters and buffers that some unit of these families owns a part of."""
    return list(dict.fromkeys(place.parameter for family in families for place in family.members))


def coverage(parameters: Iterable[str], sizes: Mapping[str, int]) -> float:
    """Share that these parameters have of all; `sizes` holds the number of entries of each."""
    return sum(sizes.get(path, 0) for path in set(parameters)) / max(1, sum(sizes.values()))


def summary(pruning: Pruning) -> list[str]:
    """What was done, in a few lines."""
    gone = [family.name for family in pruning.families if family.kind == "block" and not family.kept]
    what = (
        f"{len(gone)} of {len(pruning.families)} blocks removed ({', '.join(gone)}); blocks hold"
        if gone
        else f"{pruning.amount:.1%} of the units of {len(pruning.families)} families removed; families touch"
    )
    lines = [
        f"parameters {pruning.parameters_before:,} -> {pruning.parameters_after:,} "
        f"({1 - pruning.parameters_after / max(1, pruning.parameters_before):.1%} removed), "
        f"MACs {pruning.macs_before:,} -> {pruning.macs_after:,} "
        f"({1 - pruning.macs_after / max(1, pruning.macs_before):.1%} removed)",
        f"{what} {pruning.coverage:.1%} of the parameters",
        "not verified against the masked model"
        if pruning.max_error is None
        else f"verified against the masked model: largest relative error {pruning.max_error:.1e}",
    ]
    if pruning.frozen:
        shown = "; ".join(f"{item.name}: {item.reason}" for item in pruning.frozen[:REASONS_SHOWN])
        more = " …" if len(pruning.frozen) > REASONS_SHOWN else ""
        lines.append(f"{len(pruning.frozen)} parts frozen: {shown}{more}")
    if pruning.unused:
        lines.append(f"{len(pruning.unused)} parameters never reached by the examples, left alone")
    return lines


def for_examples(settings: Structure) -> dict[str, Any]:
    """The settings as `structured` takes them along with `examples`: a number of MACs is meant per example."""
    fields = {name: getattr(settings, name) for name in Structure.model_fields}
    if settings.target is not None and settings.target.get("macs", 0) > 1:
        fields["target"] = {"macs": settings.target["macs"] * EXAMPLE_BATCHES[0]}
    return fields


def macs_of(module: nn.Module, context: Context) -> int:
    """Multiply-accumulates at batch 1."""
    batch = context.task.example(1)
    return multiply_accumulates(module, batch.args, batch.kwargs)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
