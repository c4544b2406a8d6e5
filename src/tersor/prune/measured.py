"""What recipe steps measure before they prune: the calibrate split and the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.context import Context
from tersor.core.task import Task
from tersor.errors import DataError
from tersor.probe import Evidence, Need
from tersor.prune.sparsity import FROM_LOSS, Sparsity, measure


def calibration_batches(context: Context, who: str, *, samples: int, batch_size: int) -> list[Batch]:
    """The first `samples` examples of the calibrate split.

    Raises:
        DataError: if there is no such split.
    """
    split = context.task.require("calibrate", who)
    chosen = range(min(samples, len(split)))
    return [split.batch(chosen[start : start + batch_size]) for start in chosen[::batch_size]]


def loss_of(task: Task) -> Callable[[Any, Tensor | None], Tensor]:
    """The task's loss on what the model returns, as measuring takes it."""

    def loss(outputs: Any, labels: Tensor | None) -> Tensor:
        assert labels is not None  # noqa: S101 - `check_labels`
        return task.loss(select_output(outputs, task.output), labels)

    return loss


def check_labels(
    batches: Collection[Batch], needs: Collection[Need], who: str, criterion: str, *, instead: str = "wanda"
) -> None:
    """Raises `DataError` if something is taken from a loss and there are no labels to take it from."""
    if FROM_LOSS & set(needs) and any(batch.labels is None for batch in batches):
        raise DataError(
            f"{who} with criterion {criterion!r} needs labels in the 'calibrate' split; add them, or choose "
            f"a criterion without a loss, e.g. {instead!r}"
        )


def measured_on(
    module: nn.Module, settings: Sparsity, context: Context, who: str, *, samples: int, batch_size: int
) -> dict[str, Evidence]:
    """`measure` on the first `samples` examples of the calibrate split; nothing is read where nothing is needed.

    Raises:
        DataError: if there is no such split, or it has no labels and the criterion needs a loss.
    """
    if not settings.needs:
        return measure(module, settings)
    batches = calibration_batches(context, who, samples=samples, batch_size=batch_size)
    check_labels(batches, settings.needs, who, settings.criterion)
    return measure(module, settings, batches, loss_of(context.task))
