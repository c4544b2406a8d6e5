"""Sparse learning as a step of a recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.prune.choosing import ChosenUnits, choose_units
from tersor.prune.gradual import training_of
from tersor.prune.measured import calibration_batches, check_labels, loss_of
from tersor.prune.regularise import Learned, Penalty, sparse_learning
from tersor.prune.steps import examples, for_examples
from tersor.prune.structure import Structure
from tersor.train import Schedule


class SparseLearning(Step):
    """Trains with a penalty that makes units small; a `prune.structured` behind it removes them at little cost.

    It cuts nothing. With `growing`, `units` says which units will go, in the words of `prune.structured`: give both
    steps the same, and let the second judge by norm (`criterion: l2`), which is where the pushed units come last.
    With `lasso` all units are pushed that `units` leaves in question, by `kinds` and `exclude`.

    Attributes:
        units: Settings of the pruning that follows; its `rounds` and `compensate` play no part.
        penalty: How units are pushed.
        schedule: How training is done, on the train split with the task's loss.
        samples: Examples of the calibrate split to measure on, for criteria that need it.
        batch_size: Of these.
    """

    name: ClassVar[str] = "prune.sparse_learning"
    kind: ClassVar[Kind] = "prune"

    units: Structure = Field(default_factory=Structure)
    penalty: Penalty = Field(default_factory=Penalty)
    schedule: Schedule = Field(default_factory=Schedule)
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @property
    def needs(self) -> frozenset[Role]:
        """The train split; the calibrate split as well, where something is measured."""
        return frozenset({"train", "calibrate"}) if self._judged.criterion_.needs else frozenset({"train"})

    @property
    def _judged(self) -> Structure:
        """What decides about units; a lasso pushes all, so that nothing needs to be measured."""
        return self.units.model_copy(update={"criterion": "l2"}) if self.penalty.method == "lasso" else self.units

    def choose(self, module: nn.Module, context: Context) -> ChosenUnits:
        """The units that are pushed.

        Raises:
            CoverageError: if nothing can be pruned.
            DataError: if there is no calibrate split, or no labels in it, and the criterion needs them.
        """
        judged, batches = self._judged, None
        if judged.criterion_.needs:
            batches = calibration_batches(context, self.name, samples=self.samples, batch_size=self.batch_size)
            check_labels(batches, judged.criterion_.needs, self.name, judged.criterion)
        chosen = choose_units(
            module, examples(context.task), data=batches, loss=loss_of(context.task), **for_examples(judged)
        )
        if self.penalty.method == "lasso":
            chosen = replace(chosen, units={name: torch.arange(chosen.coupling[name].size) for name in chosen.families})
        return chosen

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy; masks hold."""
        started = time.perf_counter()
        training = training_of(context, self.name, self.schedule)
        fresh = candidate.for_weights()
        chosen = self.choose(fresh.module, context)
        learned = sparse_learning(
            fresh.module, chosen.coupling, training, self.penalty, chosen=chosen.units, masks=fresh.masks
        )
        notes = [*norms_told(learned, chosen.units), f"loss by epoch: {', '.join(f'{x:.4f}' for x in learned.trace)}"]
        seconds = time.perf_counter() - started
        return replace(fresh, module=learned.model).record(self.name, self.model_dump(mode="json"), seconds, notes)


def norms_told(learned: Learned, pushed: Mapping[str, Tensor]) -> list[str]:
    """What became of the units, in a few lines.

    Args:
        learned: Norms before and after.
        pushed: Family name -> numbers of the units that were pushed.
    """
    chosen, before, after, smallest = [], [], [], 0
    for name, norms in learned.after.items():
        mask = torch.zeros(len(norms), dtype=torch.bool)
        if name in pushed:
            mask[pushed[name]] = True
        chosen.append(mask)
        before.append(learned.before[name])
        after.append(norms)
        smallest += int(mask[norms.argsort()[: int(mask.sum())]].sum())
    mask, old, new = (torch.cat(parts) for parts in (chosen, before, after))
    if not bool(mask.any()):
        return [f"an amount of so little is no unit of {len(mask)}: none was pushed"]
    lines = [
        f"{int(mask.sum())} of {len(mask)} units pushed: their mean norm {float(old[mask].mean()):.3g} -> "
        f"{float(new[mask].mean()):.3g}"
    ]
    if not bool(mask.all()):
        lines[0] += f", that of the others {float(old[~mask].mean()):.3g} -> {float(new[~mask].mean()):.3g}"
        lines.append(f"{smallest} of the pushed units are among the smallest of their families now")
    return lines
