"""What recipe steps measure before they prune: the calibrate split and the task's loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tersor.core.batch import select_output
from tersor.core.context import Context
from tersor.errors import DataError
from tersor.probe import Evidence
from tersor.prune.sparsity import FROM_LOSS, Sparsity, measure


def measured_on(
    module: nn.Module, settings: Sparsity, context: Context, who: str, *, samples: int, batch_size: int
) -> dict[str, Evidence]:
    """`measure` on the first `samples` examples of the calibrate split; nothing is read where nothing is needed.

    Raises:
        DataError: if there is no such split, or it has no labels and the criterion needs a loss.
    """
    if not settings.needs:
        return measure(module, settings)
    split, task = context.task.require("calibrate", who), context.task
    chosen = range(min(samples, len(split)))
    batches = [split.batch(chosen[start : start + batch_size]) for start in chosen[::batch_size]]
    if settings.needs & FROM_LOSS and any(batch.labels is None for batch in batches):
        raise DataError(
            f"{who} with criterion {settings.criterion!r} needs labels in the 'calibrate' split; add them, or choose "
            "a criterion without a loss, e.g. 'wanda'"
        )

    def loss(outputs: Any, labels: Tensor | None) -> Tensor:
        assert labels is not None  # noqa: S101 - checked above
        return task.loss(select_output(outputs, task.output), labels)

    return measure(module, settings, batches, loss)
