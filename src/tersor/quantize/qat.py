"""Quantization-aware training: the model is trained while it computes with rounded weights and activations.

Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Esser et al. 2020, https://arxiv.org/abs/1902.08153.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.quantization import precision_name
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.errors import ConfigError
from tersor.graph.capture import input_tensors
from tersor.quantize.finish import finish
from tersor.quantize.prepare import Prepared, batches_of, prepare
from tersor.quantize.record import record_of
from tersor.quantize.residual import spare_residuals
from tersor.quantize.static import cautions, summary
from tersor.quantize.student import Grid, Student, deployed, install
from tersor.quantize.widths import Widths
from tersor.train import Checkpoints, Hooks, Schedule, blended, fit, hard_loss


class Qat(Widths, Step):
    """Calibrates like `quantize.static`, then trains weights, BatchNorm and quantizers together; masks keep holding.

    `activation_bits` is for the inputs of layers; residual sums, poolings and whatever else reads the same values gets
    them in at least `residual_bits`.

    `quantizer` says what is learned: `lsq` every step size, `lsq+` the activations' zero points too, `pact` the
    activations' clipping levels, `ste` none, the calibrated ranges stay. In the last `freeze_batchnorm` of the steps
    BatchNorm uses its running statistics, as the deployed model does, and keeps them. `gradual: [8, 6]` gives every
    tensor at least 8, then 6, then its own bits, each for an equal share of the steps.

    With `distill` the loss is ``alpha · distillation(outputs, original's) + (1 − alpha) · task loss``, as in `recover`;
    without labels it is the distillation alone. `distill` names one of `Context.losses`.
    """

    name: ClassVar[str] = "quantize.qat"
    kind: ClassVar[Kind] = "quantize"
    rebuilds: ClassVar[bool] = True

    residual_bits: int = Field(default=8, ge=2, le=8)
    schedule: Schedule = Field(default_factory=Schedule)
    quantizer: Literal["lsq", "lsq+", "pact", "ste"] = "lsq"
    range_method: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    samples: int = Field(default=300, ge=1)
    batch_size: int = Field(default=50, ge=1)
    freeze_batchnorm: float = Field(default=0.2, ge=0, le=1)
    gradual: tuple[int, ...] = Field(default=(), strict=False)
    distill: str | None = None
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.9, ge=0, le=1)
    pack: bool = False

    @field_validator("gradual")
    @classmethod
    def _in_reach(cls, gradual: tuple[int, ...]) -> tuple[int, ...]:
        if not all(2 <= bits <= 8 for bits in gradual) or any(wide <= narrow for wide, narrow in pairwise(gradual)):
            raise ValueError("expected falling numbers of bits from 8 to 2")
        return gradual

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        narrowest = min(self.weight_bits, self.activation_bits)
        if self.gradual and self.gradual[-1] < narrowest:
            raise ValueError(f"gradual ends below the {narrowest} bits that are asked: {self.gradual}")
        return self

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate and the train split."""
        return frozenset({"calibrate", "train"})

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name("static", packed=self.pack)

    def check(self, context: Context) -> None:
        """Raises `ConfigError` if there is nothing to learn from, before any work."""
        if self.distill is not None and self.distill not in context.losses:
            raise ConfigError(f"{self.name}.distill: expected one of {sorted(context.losses)}, got {self.distill!r}")
        split = context.task.require("train", self.name)
        if self.distill is None and split.batch([0]).labels is None:
            raise ConfigError(
                f"{self.name} has no labels to learn from; name a distillation loss, of {sorted(context.losses)}, to "
                "learn from the original's answers: distill"
            )

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Trains a copy; the result carries the plan and its simulation."""
        started = time.perf_counter()
        self.check(context)
        student = Student(self._prepare(candidate, context), candidate.module, candidate.masks)
        split = context.task.require("calibrate", self.name)
        batches = batches_of(split, self.samples, self.batch_size)
        student.calibrate(self._widths(), self.range_method, batches)
        if self.quantizer != "ste":
            student.learn(self.quantizer, decay=self.schedule.weight_decay)
        trace = self._train(student, context)
        trained, grids = student.trained(candidate.module)
        prepared = self._prepare(replace(candidate, module=trained), context)
        install(prepared, deployed(prepared, grids))
        plan, module = finish(prepared, trained, pack=self.pack)
        notes = [
            summary(prepared, student.unreached)
            + f", trained with {self.quantizer}, ranges by {self.range_method} on "
            + f"{min(self.samples, len(split))} examples to start from",
            f"loss by epoch: {', '.join(f'{value:.4f}' for value in trace)}",
            *cautions(prepared, student.unreached),
        ]
        done = replace(candidate, module=module, plan=plan, simulation=prepared.simulation.eval())
        widths = record_of(prepared, context.task.example(1))
        seconds = time.perf_counter() - started
        return done.record(self.name, self.model_dump(mode="json"), seconds, notes, quantization=widths)

    def resume(self, candidate: Candidate, context: Context) -> Candidate:
        """Builds the simulation anew from the module and the plan that an earlier `apply` left."""
        prepared = self._prepare(candidate, context)
        install(prepared, _planned(prepared, candidate))
        finish(prepared, candidate.module, pack=self.pack)
        return replace(candidate, simulation=prepared.simulation.eval())

    def _prepare(self, candidate: Candidate, context: Context) -> Prepared:
        return spare_residuals(prepare(candidate, context, self.name, self), self.residual_bits)

    def _widths(self) -> tuple[int, ...]:
        """The least bits of each stage."""
        narrowest = min(self.weight_bits, self.activation_bits)
        return self.gradual if self.gradual and self.gradual[-1] == narrowest else (*self.gradual, narrowest)

    def _train(self, student: Student, context: Context) -> list[float]:
        task = context.task
        distance = None if self.distill is None else context.losses[self.distill]

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            blend = blended(batch, self.schedule)
            outputs: Tensor = module(*input_tensors(blend.batch))
            if distance is None:
                return hard_loss(outputs, blend, task, self.schedule)
            with torch.no_grad():
                expected = select_output(blend.batch.call(context.original), task.output)
            soft = distance(outputs, expected, self.temperature)
            if batch.labels is None or self.alpha == 1:
                return soft
            return self.alpha * soft + (1 - self.alpha) * hard_loss(outputs, blend, task, self.schedule)

        def before_step(step: int, total: int) -> None:
            student.before_step(step, total, frozen_from=total - round(self.freeze_batchnorm * total))

        hooks = Hooks(
            before_step,
            student.after_step,
            progress=partial(context.progress, self.name),
            stateful={"student": student},
        )
        return fit(
            student.graph.requires_grad_(True),
            task.require("train", self.name),
            loss,
            schedule=self.schedule,
            seed=context.seed,
            hooks=hooks,
            keep=None if context.directory is None else Checkpoints(context.directory),
        ).losses


def _planned(prepared: Prepared, candidate: Candidate) -> dict[str, Grid]:
    """The grids that the candidate's plan names, by quantizer path."""
    assert candidate.plan is not None  # noqa: S101 - only called with one
    found = {f"{tensor.role} {tensor.name}": tensor for tensor in candidate.plan.tensors}
    placement, result = prepared.placement, {}
    for role, places in (("weight", placement.weights), ("activation", placement.activations)):
        for path, name in places.items():
            tensor = found.get(f"{role} {name}")
            if tensor is not None:
                zero_point = torch.tensor(tensor.zero_point, dtype=torch.int32)
                result[path] = Grid(tensor.scheme, torch.tensor(tensor.scale), zero_point)
    return result
