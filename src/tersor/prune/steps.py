"""Structured pruning as a step of a recipe."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.report import FrozenPart, PrunedFamily, Pruning
from tersor.core.step import Kind, Step
from tersor.core.task import Role, Task
from tersor.graph import Coupling
from tersor.probe import multiply_accumulates, reestimate_batchnorm
from tersor.prune.measured import calibration_batches, check_labels, loss_of
from tersor.prune.structure import Structure
from tersor.prune.structured import PruneReport, structured

EXAMPLE_BATCHES = (2, 3)  # two sizes: what follows the batch is not what follows the model
REASONS_SHOWN = 3


@dataclass(frozen=True)
class Pruned:
    """A pruned module: the report of the function, and what of it goes into the run's report."""

    report: PruneReport
    pruning: Pruning

    def notes(self) -> list[str]:
        """For the history."""
        return [*summary(self.pruning), *self.report.notes]


class Structured(Step, Structure):
    """Removes whole channels, heads, neurons and hidden units, and proves that nothing broke.

    Settings as in `Structure`. Criteria and compensation that are measured look at `samples` examples of the
    calibrate split; BatchNorm statistics are re-estimated on them where the task has that split.
    """

    name: ClassVar[str] = "prune.structured"
    kind: ClassVar[Kind] = "prune"

    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("kinds", "exclude", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given  # YAML has no tuples

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, where something is measured."""
        return frozenset({"calibrate"}) if self.needs_evidence else frozenset()

    def settings(self) -> Structure:
        """As what the function takes."""
        return Structure(**{name: getattr(self, name) for name in Structure.model_fields})

    def prune(self, module: nn.Module, context: Context) -> Pruned:
        """Prunes `module` in place, on the examples of the context's task.

        Raises:
            CoverageError: if nothing can be pruned.
            DataError: if there is no calibrate split, or no labels in it, and the criterion needs them.
        """
        batches = self.batches(context)
        check_labels(batches or (), self.needs_evidence, self.name, self.criterion)
        before, sizes = _macs(module, context), {path: p.numel() for path, p in module.named_parameters()}
        layers = _layers(module)
        report = structured(
            module,
            examples(context.task),
            data=batches,
            loss=loss_of(context.task),
            inplace=True,
            **_for_batch(self.settings(), EXAMPLE_BATCHES[0]),
        )
        report = replace(report, macs_before=before, macs_after=_macs(module, context))
        return Pruned(report, pruning_of(report, sizes, layers))

    def batches(self, context: Context) -> list[Batch] | None:
        """What is measured on, and BatchNorm statistics are averaged over; None without a calibrate split."""
        if not self.needs and context.task.get("calibrate") is None:
            return None
        batches = calibration_batches(context, self.name, samples=self.samples, batch_size=self.batch_size)
        if len(batches) > 1 and len(batches[-1]) == 1 < self.batch_size:
            batches.pop()  # a BatchNorm has no variance of a single example
        return batches

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Prunes a copy; masks shrink along with their parameters."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        done = self.prune(fresh.module, context)
        cut = fresh.after(done.report.surgery, fresh.module)
        if cut.masks and self.compensate:  # least squares knows nothing of masks
            apply_masks(cut.module, cut.masks)
            reestimate_batchnorm(cut.module, self.batches(context) or ())
        seconds = time.perf_counter() - started
        return cut.record(self.name, self.model_dump(mode="json"), seconds, done.notes(), done.pruning)


def examples(task: Task) -> list[Any]:
    """Example inputs as `structured` takes them, at two batch sizes; positional or by keyword, as the task has them."""
    batches = [task.example(size) for size in EXAMPLE_BATCHES]
    return [batch.kwargs or batch.args for batch in batches]


def pruning_of(report: PruneReport, sizes: dict[str, int], layers: list[str]) -> Pruning:
    """What the run's report keeps of a pruning.

    Args:
        report: What was done.
        sizes: Parameter path -> number of entries, before.
        layers: Modules with parameters, in the model's order.
    """
    cuts = {cut.name: cut for cut in report.families}
    return Pruning(
        parameters_before=report.params_before,
        parameters_after=report.params_after,
        macs_before=report.macs_before,
        macs_after=report.macs_after,
        amount=report.amount,
        coverage=coverage(report.coupling, set(cuts), sizes),
        families=[
            PrunedFamily(
                name=family.name,
                kind=family.kind,
                units=family.size,
                kept=cuts[family.name].kept,
                layers=list(dict.fromkeys(_owner(place.parameter) for place in family.members)),
            )
            for family in report.coupling.families
            if family.name in cuts
        ],
        frozen=[FrozenPart(name=item.name, reason=item.reason) for item in report.frozen],
        unused=list(report.unused),
        max_error=report.max_error,
        layers=layers,
    )


def coverage(coupling: Coupling, families: set[str], sizes: dict[str, int]) -> float:
    """Share of a model's parameters that some of these families touch."""
    touched = {place.parameter for family in coupling.families if family.name in families for place in family.members}
    return sum(sizes.get(path, 0) for path in touched) / max(1, sum(sizes.values()))


def summary(pruning: Pruning) -> list[str]:
    """What was done, in a few lines."""
    lines = [
        f"parameters {pruning.parameters_before:,} -> {pruning.parameters_after:,} "
        f"({1 - pruning.parameters_after / max(1, pruning.parameters_before):.1%} removed), "
        f"MACs {pruning.macs_before:,} -> {pruning.macs_after:,} "
        f"({1 - pruning.macs_after / max(1, pruning.macs_before):.1%} removed)",
        f"{pruning.amount:.1%} of the units of {len(pruning.families)} families removed; "
        f"families touch {pruning.coverage:.1%} of the parameters",
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


def _for_batch(settings: Structure, size: int) -> dict[str, Any]:
    """The settings for `size` examples at once: a number of MACs is meant per example."""
    fields = {name: getattr(settings, name) for name in Structure.model_fields}
    if settings.target is not None and settings.target.get("macs", 0) > 1:
        fields["target"] = {"macs": settings.target["macs"] * size}
    return fields


def _macs(module: nn.Module, context: Context) -> int:
    batch = context.task.example(1)
    return multiply_accumulates(module, batch.args, batch.kwargs)


def _layers(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(_owner(path) for path, _ in module.named_parameters()))


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
