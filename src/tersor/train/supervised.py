"""Learning from labels, also from smoothed and from blended ones.

Shapes: `B` batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError
from tersor.train.hooks import BatchLoss
from tersor.train.schedule import Schedule


class Blend(NamedTuple):
    """A batch whose inputs are `share · x + (1 − share) · other x`; `other` has the labels of the others."""

    batch: Batch
    other: Tensor | None = None
    share: float = 1.0


def check_mixable(batch: Batch) -> None:
    """Raises `ConfigError` if an input is not made of real numbers: tokens cannot be mixed."""
    whole = [name for name, value in batch.tensors().items() if not value.is_floating_point()]
    if whole:
        raise ConfigError(f"Schedule.mixup blends inputs, which must be real numbers; {whole} are not: leave it out")


def blended(batch: Batch, schedule: Schedule) -> Blend:
    """Mixes the examples in pairs, if the schedule says so (mixup).

    Raises:
        ConfigError: if an input is not made of real numbers: tokens cannot be mixed.
    """
    if not schedule.mixup:
        return Blend(batch)
    check_mixable(batch)
    share = float(torch.distributions.Beta(schedule.mixup, schedule.mixup).sample())
    order = torch.randperm(len(batch), device=next(iter(batch.tensors().values())).device)

    def mix(value: Tensor) -> Tensor:
        return share * value + (1 - share) * value[order]

    mixed = replace(
        batch,
        args=tuple(mix(value) for value in batch.args),
        kwargs={name: mix(value) for name, value in batch.kwargs.items()},
        positions=None,  # no longer examples of the split
    )
    return Blend(mixed, None if batch.labels is None else batch.labels[order], share)


def hard_loss(outputs: Tensor, blend: Blend, task: Task, schedule: Schedule) -> Tensor:
    """The task's loss on the labels, `share · L(outputs, labels) + (1 − share) · L(outputs, other labels)`.

    Raises:
        DataError: if there are no labels.
        ConfigError: if labels are to be smoothed and the task has a loss of its own.
    """
    if blend.batch.labels is None:
        raise DataError(
            "training with the task's loss needs labels, but the 'train' split has none; add them, or learn from the "
            "original model's outputs alone, as `recover` can"
        )
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # under autocast it may be a half
    smoothing = schedule.label_smoothing
    loss = task.smoothed_loss(outputs, blend.batch.labels, smoothing)
    if blend.other is None:
        return loss
    return blend.share * loss + (1 - blend.share) * task.smoothed_loss(outputs, blend.other, smoothing)


def supervised(task: Task, schedule: Schedule) -> BatchLoss:
    """The loss of ordinary training.

    Args:
        task: Its loss, and which output counts.
        schedule: Whether labels are smoothed and examples blended.

    Raises:
        ConfigError: if labels are to be smoothed and the task has a loss of its own.
    """
    task.check_smoothing(schedule.label_smoothing)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        blend = blended(batch, schedule)
        return hard_loss(select_output(blend.batch.call(module), task.output), blend, task, schedule)

    return loss
