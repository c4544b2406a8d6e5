"""Recovery fine-tuning with knowledge distillation from the original model.

``loss = alpha · distillation(student, original) + (1 − alpha) · task loss``. Hinton et al. 2015,
https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import time
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.distill import losses
from tersor.train import Hooks, Schedule, fit


class Recover(Step):
    """Trains the candidate to answer like the original again; masks keep holding.

    Without labels it learns from the original's answers alone.
    """

    name: ClassVar[str] = "recover"
    kind: ClassVar[Kind] = "recover"

    schedule: Schedule = Field(default_factory=Schedule)
    loss: str = "kd"
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.9, ge=0, le=1)

    @field_validator("loss")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in losses.__all__:
            raise ValueError(f"expected one of {losses.__all__}")
        return name

    @property
    def needs(self) -> frozenset[Role]:
        """The train split."""
        return frozenset({"train"})

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy."""
        started = time.perf_counter()
        split = context.task.require("train", self.name)
        fresh = candidate.for_weights()
        distance, task = getattr(losses, self.loss), context.task

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                expected = select_output(batch.call(context.original), task.output)
            outputs = select_output(batch.call(module), task.output)
            soft: Tensor = distance(outputs, expected, self.temperature)
            if batch.labels is None or self.alpha == 1:
                return soft
            return self.alpha * soft + (1 - self.alpha) * task.loss(outputs, batch.labels)

        trace = fit(
            fresh.module.requires_grad_(True),
            split,
            loss,
            schedule=self.schedule,
            seed=context.seed,
            hooks=Hooks(
                after_step=lambda: apply_masks(fresh.module, fresh.masks),
                progress=partial(context.progress, self.name),
            ),
        ).losses
        notes = [f"loss by epoch: {', '.join(f'{value:.4f}' for value in trace)}"]
        return fresh.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)
