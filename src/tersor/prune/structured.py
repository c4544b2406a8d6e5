"""Structured pruning: removes whole channels, heads, neurons, hidden units, and proves that nothing broke.

Which entries must go together is found out by `tersor.graph.couple` (Fang et al. 2023 call it a dependency graph,
https://arxiv.org/abs/2301.12900); every surgery is checked numerically against the masked model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from tersor.core.surgery import Surgery
from tersor.errors import ConfigError, CoverageError, SurgeryError, UnsupportedError
from tersor.graph import Coupling, Family, Frozen, Verifier, apply_surgery, compare, couple, plan_surgery
from tersor.graph.coupling import Run, runs_of
from tersor.graph.coupling.trace import Rule
from tersor.probe import Evidence, collect, multiply_accumulates, reestimate_batchnorm
from tersor.prune.allocation import reach
from tersor.prune.compensate import compensate
from tersor.prune.scoring import Scorer
from tersor.prune.sparsity import FROM_LOSS, batches_of
from tersor.prune.structure import DEFAULT_AMOUNT, Structure, choose

Loss = Callable[[Any, Tensor | None], Tensor]


class FamilyCut(NamedTuple):
    """One family: how many of its units stayed."""

    name: str
    kind: str
    units: int
    kept: int


@dataclass(frozen=True)
class PruneReport:
    """A pruned model and what is known about it.

    Attributes:
        model: The smaller model.
        surgery: What was cut, as data; `tersor.graph.apply_surgery` replays it on a freshly built model.
        coupling: What can be cut at all; print it.
        families: What was cut of each family that could be.
        frozen: What could not be removed, with the reason.
        unused: Parameters that the example inputs never reached; they are left alone.
        params_before: Number of parameters.
        params_after: Number of parameters.
        macs_before: Multiply-accumulates on the first example input.
        macs_after: Multiply-accumulates on the first example input.
        max_error: Largest relative difference from the masked model that a check saw; None if none was asked for.
        seconds: Spent on `coupling`, `scoring`, `surgery`, `verification`.
        notes: What a reader must know.
    """

    model: nn.Module
    surgery: Surgery
    coupling: Coupling
    families: tuple[FamilyCut, ...]
    frozen: list[Frozen]
    unused: tuple[str, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    max_error: float | None
    seconds: Mapping[str, float]
    notes: list[str] = field(default_factory=list)

    @property
    def amount(self) -> float:
        """Share of the prunable units that went, after floors and rounding."""
        units = sum(cut.units for cut in self.families)
        return 1 - sum(cut.kept for cut in self.families) / units if units else 0.0

    def __str__(self) -> str:
        lines = [
            f"parameters {self.params_before:,} -> {self.params_after:,} "
            f"({1 - self.params_after / max(1, self.params_before):.1%} removed)",
            f"MACs {self.macs_before:,} -> {self.macs_after:,} "
            f"({1 - self.macs_after / max(1, self.macs_before):.1%} removed)",
            f"units removed {self.amount:.1%} of {len(self.families)} families",
            "not verified" if self.max_error is None else f"verified, max relative error {self.max_error:.1e}",
            *(f"{cut.name}: {cut.units} -> {cut.kept} {cut.kind}s" for cut in self.families),
            *(f"frozen {item.name}: {item.reason}" for item in self.frozen),
            *(f"unused {name}" for name in self.unused),
            *self.notes,
        ]
        return "\n".join(lines)


def structured(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Any = None,
    loss: Loss | None = None,
    inplace: bool = False,
    rules: Mapping[str, Rule] | None = None,
    **settings: Any,
) -> PruneReport:
    """Removes the least important units of a copy of `model`, and proves the result right.

    ```python
    report = tersor.prune.structured(model, example_inputs=images, amount=0.5)
    report = tersor.prune.structured(model, tokens, target={"macs": 0.7}, criterion="taylor", data=batches, loss=loss)
    print(report)                      # what went, what was frozen and why
    smaller = report.model
    ```

    Args:
        model: Stays as it is unless `inplace`.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keywords, or a list of several of these.
        data: For measured criteria, compensation, and BatchNorm: a split, one batch, or a list of batches. With
            data, BatchNorm statistics are re-estimated.
        loss: For criteria from gradients: `(outputs, labels) -> scalar`.
        inplace: Changes `model` itself, once all checks have passed. Rebuild its optimizer.
        rules: For operators of your own; see `tersor.graph.couple`.
        **settings: Fields of `Structure`: `amount` (0.5), `target`, `threshold`, `criterion` ("l2"), `allocation`,
            `floor`, `round_to`, `kinds`, `exclude`, `compensate`, `verify` …

    Raises:
        ConfigError: if a setting is wrong, or data or a loss is missing.
        ModelError: if the model does not run on the example inputs.
        CoverageError: if nothing can be pruned, with the reasons.
    """
    wanted = Structure(**settings)
    _check_data(wanted, data, loss)
    batches = None if data is None else list(batches_of(data))
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        report = _in_rounds(model, wanted, _Material(example_inputs, batches, loss, rules), inplace)
    finally:
        _set_modes(model, modes)
    _set_modes(report.model, modes)
    return report


def _set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    for path, module in model.named_modules():
        module.training = modes.get(path, module.training)


def _check_data(settings: Structure, data: Any, loss: Loss | None) -> None:
    needs = settings.needs_evidence
    if needs and data is None:
        raise ConfigError(
            f"criterion {settings.criterion!r}{' with compensation' if settings.compensate else ''} is measured on "
            f"data ({', '.join(sorted(needs))}); pass data=..., batches of examples"
        )
    if needs & FROM_LOSS and loss is None:
        raise ConfigError(
            f"criterion {settings.criterion!r} is taken from gradients; pass loss=..., a function "
            "(outputs, labels) -> scalar"
        )


@dataclass(frozen=True)
class _Material:
    """What is given beside the model and the settings."""

    examples: Any
    batches: list[Any] | None
    loss: Loss | None
    rules: Mapping[str, Rule] | None


def _in_rounds(model: nn.Module, settings: Structure, material: _Material, inplace: bool) -> PruneReport:
    """All rounds; the report tells of them together."""
    goal = next(iter(settings.target or {"parameters": 0}))
    whole = _size(model, goal, runs_of(material.examples)[0])
    first = last = _Operation(model, settings.step(1, whole), material).run()
    surgery, seconds, error = first.surgery, dict(first.seconds), first.max_error
    kept = {cut.name: cut.kept for cut in first.families}
    for number in range(2, settings.rounds + 1):
        last = _Operation(last.model, settings.step(number, whole), material).run()
        surgery = surgery.then(last.surgery)
        seconds = {name: value + last.seconds.get(name, 0.0) for name, value in seconds.items()}
        error = None if error is None else max(error, last.max_error or 0.0)
        kept |= {cut.name: cut.kept for cut in last.families if cut.name in kept}
    result = last.model
    if inplace:
        result = apply_surgery(model, surgery)
        result.load_state_dict(last.model.state_dict())
    return replace(
        first,
        model=result,
        surgery=surgery,
        families=tuple(cut._replace(kept=kept[cut.name]) for cut in first.families),
        params_after=last.params_after,
        macs_after=last.macs_after,
        max_error=error,
        seconds=seconds,
        notes=list(dict.fromkeys([*first.notes, *last.notes])),
    )


class _Operation:
    """One round, step by step; the model stays as it is."""

    def __init__(self, model: nn.Module, settings: Structure, material: _Material) -> None:
        self.model, self.settings = model, settings
        self.examples, self.runs = material.examples, runs_of(material.examples)
        self.batches, self.loss, self.rules = material.batches, material.loss, material.rules
        self.seconds: dict[str, float] = {}
        self.frozen: list[Frozen] = []
        self.error: float | None = None
        self.notes: list[str] = []

    def run(self) -> PruneReport:
        """Couples, verifies, scores, cuts."""
        with _Timer(self.seconds, "coupling"):
            coupling = couple(self.model, self.examples, rules=self.rules)
        self.frozen += coupling.frozen
        macs_before = multiply_accumulates(self.model, *self.runs[0])
        families = self._sound(coupling)
        with _Timer(self.seconds, "scoring"):
            evidence = collect(self.model, self.batches or (), needs=self.settings.needs_evidence, loss=self.loss)
            families, scores = self._score(families, evidence)
        with _Timer(self.seconds, "surgery"):
            removed = self._decide(coupling, families, scores, macs_before)
            surgery = plan_surgery(self.model, coupling, removed)
        work = self.model
        if self.settings.compensate and surgery.cuts:
            work = copy.deepcopy(self.model)
            refitted = compensate(work, surgery, evidence)
            self.notes.append(f"{len(refitted)} weights refitted by least squares")
        if self.settings.verify != "off" and removed:
            with _Timer(self.seconds, "verification"):
                self._prove(work, coupling, removed)
        before = _size(self.model, "parameters", self.runs[0])
        with _Timer(self.seconds, "surgery"):
            result = apply_surgery(copy.deepcopy(work) if work is self.model else work, surgery)
        if self.batches is not None and surgery.cuts:
            count = reestimate_batchnorm(result, self.batches)
            if count:
                self.notes.append(f"statistics of {count} BatchNorm layers re-estimated")
        return PruneReport(
            model=result,
            surgery=surgery,
            coupling=coupling,
            families=tuple(FamilyCut(f.name, f.kind, f.size, f.size - len(removed.get(f.name, ()))) for f in families),
            frozen=self.frozen,
            unused=coupling.unused,
            params_before=before,
            params_after=_size(result, "parameters", self.runs[0]),
            macs_before=macs_before,
            macs_after=multiply_accumulates(result, *self.runs[0]),
            max_error=self.error,
            seconds=self.seconds,
            notes=self.notes,
        )

    def _sound(self, coupling: Coupling) -> list[Family]:
        """Families that were asked for and pass verification."""
        asked = []
        for family in coupling.families:
            reason = self.settings.wants(family)
            if reason:
                self.frozen.append(Frozen(family.name, reason))
            else:
                asked.append(family)
        if self.settings.verify == "full" and asked:
            with _Timer(self.seconds, "verification"):
                verifier = Verifier(self.model, coupling, self.runs, rules=self.rules, seed=self.settings.seed)
                names, frozen, self.error = verifier.settle([family.name for family in asked])
            if len(verifier.runs) < 2:
                self.notes.append("verified at one input shape only: the model does not take another one")
            self.frozen += frozen
            asked = [family for family in asked if family.name in set(names)]
        if not asked:
            raise CoverageError(
                f"nothing of {type(self.model).__name__} can be pruned: "
                + ("; ".join(f"{item.name}: {item.reason}" for item in self.frozen[:8]) or "it has no parameters")
            )
        return asked

    def _score(
        self, families: Sequence[Family], evidence: Mapping[str, Evidence]
    ) -> tuple[list[Family], dict[str, Tensor]]:
        learned = dict(self.model.named_parameters())
        settings = self.settings
        scorer = Scorer(
            learned, evidence, settings.criterion_, reduction=settings.reduction, normalise=settings.normalise
        )
        kept, scores, last = [], {}, None
        for family in families:
            try:
                scores[family.name] = scorer(family)
                kept.append(family)
            except UnsupportedError as error:
                last = error
                self.frozen.append(Frozen(family.name, f"criterion {settings.criterion!r} says nothing about it"))
        if last is not None and not kept:
            raise last
        return kept, scores

    def _decide(
        self, coupling: Coupling, families: Sequence[Family], scores: Mapping[str, Tensor], macs: int
    ) -> dict[str, Tensor]:
        settings = self.settings
        if settings.target is None:
            return choose(families, scores, settings, DEFAULT_AMOUNT if settings.amount is None else settings.amount)
        ((goal, value),) = settings.target.items()
        whole = macs if goal == "macs" else _size(self.model, goal, self.runs[0])
        limit = value * whole if value <= 1 else value

        def cost(amount: float) -> float:
            removed = choose(families, scores, settings, amount)
            smaller = apply_surgery(copy.deepcopy(self.model), plan_surgery(self.model, coupling, removed))
            return _size(smaller, goal, self.runs[0])

        found = reach(limit, cost, tolerance=5e-3)
        if not found.reached:
            self.notes.append(
                f"target not met: {goal} {found.cost:,.0f} is the least that floors and frozen parts allow, "
                f"{limit:,.0f} was asked for"
            )
        return choose(families, scores, settings, found.amount)

    def _prove(self, model: nn.Module, coupling: Coupling, removed: Mapping[str, Tensor]) -> None:
        """The surgery that is really done, on the real weights."""
        verdict = compare(model, coupling, removed, self.runs, rules=self.rules)
        if not verdict.ok:
            raise SurgeryError(
                f"the pruned model is not the masked model: {verdict.reason}; nothing was changed. "
                "Exclude families, or report this with the model"
            )
        self.error = max(self.error or 0.0, verdict.error)


class _Timer:
    """Adds the time of its body to an entry."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.started


def _size(model: nn.Module, goal: str, run: Run) -> int:
    if goal == "macs":
        return multiply_accumulates(model, *run)
    if goal == "parameters":
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
