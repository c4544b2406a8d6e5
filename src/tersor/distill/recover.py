"""Recovery training: a compressed model learns to answer like the original again.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import time
from functools import partial
from typing import ClassVar

from pydantic import Field

from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.distill.objective import Objective, check_examples
from tersor.distill.terms import Losses
from tersor.errors import ConfigError
from tersor.train import Checkpoints, Hooks, Schedule, answers_of, evaluation, fit


class Recover(Losses, Step):
    """Trains the candidate with the original as its teacher; masks keep holding.

    `losses` are summed up, by default ``0.9 · kd + 0.1 · task``; without labels the task's is left out. With `cache`
    the original answers every training example once, and not again in every epoch: for examples that are not drawn at
    random. With `patience` in the schedule, the search split says when to stop.
    """

    name: ClassVar[str] = "recover"
    kind: ClassVar[Kind] = "recover"

    schedule: Schedule = Field(default_factory=Schedule)
    cache: bool = False

    @property
    def needs(self) -> frozenset[Role]:
        """The train split, and the search split if it says when to stop."""
        return frozenset({"train"} if self.schedule.patience is None else {"train", "search"})

    def check(self, context: Context) -> None:
        """Raises `ConfigError` or `DataError` if the examples do not suit the losses, the cache or mixup."""
        context.task.require("train", self.name)
        if self.cache and context.directory is None:
            raise ConfigError(f"{self.name}.cache needs a run directory to keep the original's answers in")
        check_examples(self.losses, context.task, self.schedule, cached=self.cache)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy."""
        started = time.perf_counter()
        self.check(context)
        split = context.task.require("train", self.name)
        fresh = candidate.for_weights()
        objective = Objective(
            self.losses,
            fresh.module,
            context.original,
            context.task,
            schedule=self.schedule,
            seed=context.seed,
            cache=context.directory if self.cache else None,
        )
        trained = fit(
            fresh.module.requires_grad_(True),
            split,
            objective,
            schedule=self.schedule,
            seed=context.seed,
            hooks=Hooks(
                after_step=lambda: apply_masks(fresh.module, fresh.masks),
                evaluate=evaluation(context.task, answers_of(context.original, context.task.output)),
                progress=partial(context.progress, self.name),
                companions=objective.companions,
            ),
            keep=None if context.directory is None else Checkpoints(context.directory),
        )
        notes = [*trained.told(), *objective.notes]
        return fresh.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)
