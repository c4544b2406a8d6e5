"""Pruning while training: masks grow step by step, and the rest of the weights takes over.

Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.split import Split
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.errors import ConfigError, DataError
from tersor.probe import Evidence
from tersor.prune.masks import check, sparsity_of
from tersor.prune.measured import measured_on
from tersor.prune.schedule import SparsitySchedule
from tersor.prune.selection import install, select
from tersor.prune.sparsity import Allocation, CriterionName, PatternName, Share, Sparsity
from tersor.prune.unstructured import NO_SPEED_UP
from tersor.train import Checkpoints, Hooks, Schedule, Stateful, fit, supervised

Measure = Callable[[nn.Module], Mapping[str, Evidence]]


@dataclass(frozen=True)
class Training:
    """How to train in between.

    Attributes:
        split: The training examples.
        loss: `(module, batch) -> scalar`: the task's, or a distillation loss, or both.
        schedule: Epochs, batch size, optimizer, learning rate.
        seed: Fixes the order of the examples.
        progress: `(steps done, steps in all, facts)` of one training.
        directory: Where a single training keeps checkpoints; None keeps none.
    """

    split: Split
    loss: Callable[[nn.Module, Batch], Tensor]
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None
    directory: Path | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of one training."""
        return self.schedule.total_steps(len(self.split))

    def run(
        self, module: nn.Module, after_step: Callable[[], None], state: Mapping[str, Stateful] | None = None
    ) -> list[float]:
        """Trains `module` in place; the mean loss of each epoch. `state` belongs into its checkpoints."""
        return fit(
            module.requires_grad_(True),
            self.split,
            self.loss,
            schedule=self.schedule,
            seed=self.seed,
            hooks=Hooks(after_step=after_step, progress=self.progress, stateful=state or {}),
            keep=None if self.directory is None or state is None else Checkpoints(self.directory),
        ).losses


@dataclass
class Grown:
    """What training left: `masks` by parameter path, losses by epoch, `skipped` with reasons, steps of the training."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    trace: list[float] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints of a training in which the masks grow."""
        return {"masks": self.masks, "skipped": [list(item) for item in self.skipped], "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.masks, self.steps = dict(state["masks"]), state["steps"]
        self.skipped = [(path, reason) for path, reason in state["skipped"]]

    def prune(self, module: nn.Module, settings: Sparsity, amount: float, measure: Measure | None) -> None:
        """Takes `module` to the share `amount`: what is gone stays gone."""
        evidence = None if measure is None else measure(module)
        wanted = settings.model_copy(update={"amount": amount})
        selection = select(module, wanted, evidence=evidence, masks=self.masks)
        install(module, selection)
        self.masks, self.skipped = selection.masks, selection.skipped

    def notes(self) -> list[str]:
        """For the report."""
        return [
            f"{sparsity_of(self.masks):.1%} of {sum(mask.numel() for mask in self.masks.values()):,} weights are zero",
            f"loss by epoch: {', '.join(f'{value:.4f}' for value in self.trace)}",
            NO_SPEED_UP,
            *(f"{path} stays dense: {reason}" for path, reason in self.skipped),
        ]


def gradual(
    module: nn.Module,
    training: Training,
    settings: Sparsity,
    *,
    over: SparsitySchedule | None = None,
    masks: Mapping[str, Tensor] | None = None,
    measure: Measure | None = None,
) -> Grown:
    """Trains `module` in place while its sparsity grows to ``settings.amount``.

    The masks are made anew at the steps that `over` names, after the optimizer's update, and hold after every step:
    whatever momentum does to a masked weight is undone before the next forward pass. What is gone does not come back.

    Args:
        module: Changed in place.
        training: Data, loss, optimizer.
        settings: Final amount, criterion, pattern.
        over: When the sparsity rises; cubic over the first three quarters by default.
        masks: Entries that are gone already.
        measure: `module -> evidence`, asked before every update of the masks, for criteria that need data.

    Raises:
        ConfigError: if the amount is not free: with a threshold, an N:M pattern or amounts per layer; or if weights
            are averaged.
    """
    amount = growing(settings)
    if training.schedule.ema is not None:
        raise ConfigError("averaged weights (ema) remember what has gone since: leave ema out while masks grow")
    plan = (over or SparsitySchedule()).plan(amount, training.steps)
    grown = Grown(masks=dict(masks or {}))
    if 0 in plan:
        grown.prune(module, settings, plan[0], measure)

    def after_step() -> None:
        grown.steps += 1
        apply_masks(module, grown.masks)
        if grown.steps in plan:
            grown.prune(module, settings, plan[grown.steps], measure)

    grown.trace = training.run(module, after_step, {"grown": grown})
    check(module, grown.masks)
    return grown


def growing(settings: Sparsity) -> float:
    """The final amount, if it can grow."""
    if settings.threshold is not None or settings.pattern_.share is not None or isinstance(settings.allocation, dict):
        raise ConfigError(
            "sparsity can only grow where one amount decides: leave threshold, N:M patterns and amounts per layer to "
            "prune.unstructured"
        )
    if settings.reconstruct is not None:
        raise ConfigError("training repairs what pruning breaks: leave reconstruct to prune.unstructured")
    return settings.share


def training_of(context: Context, who: str, schedule: Schedule) -> Training:
    """Training on the task's train split with the task's loss, as steps do it.

    Raises:
        DataError: if there is no such split, or it has no labels.
    """
    train = context.task.require("train", who)
    if train.batch([0]).labels is None:
        raise DataError(f"{who} trains with the task's loss, but the 'train' split has no labels; add them")
    return Training(
        train,
        supervised(context.task, schedule),
        schedule,
        context.seed,
        partial(context.progress, who),
        context.directory,
    )


class WhileTraining(Step):
    """What steps that prune while they train have in common: what goes, and how training is done."""

    kind: ClassVar[Kind] = "prune"

    sparsity: Share
    criterion: CriterionName = "l1"
    pattern: PatternName = "unstructured"
    allocation: Allocation = "global"
    floor: Share = 0.01
    schedule: Schedule = Field(default_factory=Schedule)
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> WhileTraining:
        growing(self.settings())
        return self

    def settings(self) -> Sparsity:
        """As what the functions take."""
        return Sparsity(
            amount=self.sparsity,
            criterion=self.criterion,
            pattern=self.pattern,
            allocation=self.allocation,
            floor=self.floor,
        )

    @property
    def needs(self) -> frozenset[Role]:
        """The train split; the calibrate split as well, where something is measured."""
        return frozenset({"train", "calibrate"}) if self.settings().needs else frozenset({"train"})

    def measure(self, context: Context) -> Measure | None:
        """What is measured before every update of the masks."""
        settings = self.settings()
        if not settings.needs:
            return None
        return lambda module: measured_on(
            module, settings, context, self.name, samples=self.samples, batch_size=self.batch_size
        )

    def record(self, fresh: Candidate, grown: Grown, started: float) -> Candidate:
        """The candidate with its masks and one more entry in its history."""
        seconds = time.perf_counter() - started
        return replace(fresh, masks=grown.masks).record(self.name, self.model_dump(mode="json"), seconds, grown.notes())


class Gradual(WhileTraining):
    """Trains on the task's loss while the sparsity grows; `over` says when, `schedule` how training is done."""

    name: ClassVar[str] = "prune.gradual"

    over: SparsitySchedule = Field(default_factory=SparsitySchedule)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        grown = gradual(
            fresh.module,
            training_of(context, self.name, self.schedule),
            self.settings(),
            over=self.over,
            masks=fresh.masks,
            measure=self.measure(context),
        )
        return self.record(fresh, grown, started)
