"""Structured pruning: removes whole channels, heads, neurons, hidden units, and proves that nothing broke.

Which entries must go together is found out by `tersor.graph.couple` (Fang et al. 2023 call it a dependency graph,
https://arxiv.org/abs/2301.12900); every surgery is checked numerically against the masked model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from tersor.core.surgery import Surgery
from tersor.errors import CoverageError
from tersor.graph import Coupling, Verdict, apply_surgery, compare, plan_surgery
from tersor.graph.coupling import runs_of
from tersor.graph.coupling.trace import Rule
from tersor.graph.verify import sound_together
from tersor.probe import multiply_accumulates
from tersor.prune.choosing import Choosing, Loss, Material, Timer, evaluation, set_modes, size_of
from tersor.prune.compensate import compensate
from tersor.prune.outcome import Outcome, with_statistics
from tersor.prune.structure import Structure


class FamilyCut(NamedTuple):
    """One family: how many of its units stayed."""

    name: str
    kind: str
    units: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class PruneReport(Outcome):
    """A model with fewer units; `Outcome` has what all prunings tell.

    Attributes:
        coupling: What can be cut at all; print it.
        families: What was cut of each family that could be.
        unused: Parameters that the example inputs never reached; they are left alone.
    """

    coupling: Coupling
    families: tuple[FamilyCut, ...]
    unused: tuple[str, ...]

    @property
    def amount(self) -> float:
        """Share of the prunable units that went, after floors and rounding."""
        units = sum(cut.units for cut in self.families)
        return 1 - sum(cut.kept for cut in self.families) / units if units else 0.0

    def __str__(self) -> str:
        removed = f"units removed {self.amount:.1%} of {len(self.families)} families"
        families = [f"{cut.name}: {cut.units} -> {cut.kept} {cut.kind}s" for cut in self.families]
        return self.told([removed, *families], [f"unused {name}" for name in self.unused])


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
    material = Material.of(wanted, example_inputs, data, loss, rules)
    with evaluation(model) as modes:
        report = _in_rounds(model, wanted, material, inplace)
    set_modes(report.model, modes)
    return report


def _in_rounds(model: nn.Module, settings: Structure, material: Material, inplace: bool) -> PruneReport:
    """All rounds; the report tells of them together."""
    goal = next(iter(settings.target or {"parameters": 0}))
    whole = size_of(model, goal, runs_of(material.examples)[0])
    first = last = _round(model, settings.step(1, whole), material)
    surgery, seconds, error = first.surgery, dict(first.seconds), first.max_error
    kept = {cut.name: cut.kept for cut in first.families}
    frozen = {item.name: item for item in first.frozen}
    stopped = []
    for number in range(2, settings.rounds + 1):
        try:
            last = _round(last.model, settings.step(number, whole), material)
        except CoverageError as reason:
            stopped.append(f"round {number} of {settings.rounds} found nothing more to remove: {reason}")
            break
        surgery = surgery.then(last.surgery)
        seconds = {name: value + last.seconds.get(name, 0.0) for name, value in seconds.items()}
        error = None if error is None else max(error, last.max_error or 0.0)
        kept |= {cut.name: cut.kept for cut in last.families if cut.name in kept}
        frozen = {item.name: item for item in last.frozen} | frozen
    result = last.model
    if inplace:
        result = apply_surgery(model, surgery)
        result.load_state_dict(last.model.state_dict())
    return replace(
        first,
        model=result,
        surgery=surgery,
        families=tuple(cut._replace(kept=kept[cut.name]) for cut in first.families),
        frozen=list(frozen.values()),
        params_after=last.params_after,
        macs_after=last.macs_after,
        max_error=error,
        seconds=seconds,
        notes=list(dict.fromkeys([*first.notes, *last.notes, *stopped])),
    )


class _Plan(NamedTuple):
    """What is about to be cut, and out of what."""

    units: Mapping[str, Tensor]
    surgery: Surgery
    model: nn.Module
    notes: list[str]


def _round(model: nn.Module, settings: Structure, material: Material) -> PruneReport:
    """One round; the model stays as it is."""
    choosing = Choosing(model, settings, material)
    plan = _proven(choosing)
    notes = [*choosing.notes, *plan.notes]
    run, before = choosing.runs[0], size_of(model, "parameters", choosing.runs[0])
    with Timer(choosing.seconds, "surgery"):
        result = apply_surgery(copy.deepcopy(model) if plan.model is model else plan.model, plan.surgery)
    if plan.surgery.cuts:
        notes += with_statistics(result, material.batches)
    return PruneReport(
        model=result,
        surgery=plan.surgery,
        coupling=choosing.coupling,
        families=tuple(
            FamilyCut(family.name, family.kind, family.size, family.size - len(plan.units.get(family.name, ())))
            for family in choosing.families
        ),
        frozen=choosing.frozen,
        unused=choosing.coupling.unused,
        params_before=before,
        params_after=size_of(result, "parameters", run),
        macs_before=choosing.macs,
        macs_after=multiply_accumulates(result, *run),
        max_error=choosing.error,
        seconds=choosing.seconds,
        notes=notes,
    )


def _proven(choosing: Choosing) -> _Plan:
    """The surgery that is really done, right on the real weights: what is not is frozen, and units are chosen anew."""
    while True:
        plan = _planned(choosing)
        if choosing.settings.verify == "off" or not plan.units:
            return plan
        with Timer(choosing.seconds, "verification"):
            where = "verification on the model's own weights"
            _, wrong, error = sound_together(list(plan.units), partial(_compared, choosing, plan), where=where)
        if not wrong:
            choosing.error = max(choosing.error or 0.0, error)
            return plan
        choosing.freeze(wrong)


def _planned(choosing: Choosing) -> _Plan:
    with Timer(choosing.seconds, "surgery"):
        units = choosing.units()
        surgery = plan_surgery(choosing.model, choosing.coupling, units)
    notes = [choosing.shortfall] if choosing.shortfall else []
    if not choosing.settings.compensate or not surgery.cuts:
        return _Plan(units, surgery, choosing.model, notes)
    work = copy.deepcopy(choosing.model)
    refitted = compensate(work, surgery, choosing.evidence)
    return _Plan(units, surgery, work, [*notes, f"{len(refitted)} weights refitted by least squares"])


def _compared(choosing: Choosing, plan: _Plan, names: Sequence[str]) -> Verdict:
    """What cutting these families of the plan alone comes to."""
    units = {name: plan.units[name] for name in names}
    return compare(plan.model, choosing.coupling, units, choosing.runs, rules=choosing.material.rules)
