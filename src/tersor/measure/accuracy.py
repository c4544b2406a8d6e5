"""Runs a model over a split and keeps what metrics, certificate and comparison need.

Shapes: `N` examples, `B` batch, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersor.core.batch import select_output
from tersor.core.metrics import Metric
from tersor.core.split import Split
from tersor.errors import DataError, NonFiniteError


@dataclass(frozen=True)
class Evaluation:
    """One model on one split.

    Attributes:
        value: The metric.
        statistic: Its per-example statistic `[N, …]`.
        labels: Labels `[N, …]`, the original's outputs for metrics against it, or None.
        predictions: Predicted class `[N]` where the output is `[N, C]` with C > 1, else None.
        confidences: Probability of the predicted class `[N]`, likewise.
    """

    value: float
    statistic: Tensor
    labels: Tensor | None
    predictions: Tensor | None
    confidences: Tensor | None


def evaluate(
    predict: Callable[..., Any],
    split: Split,
    metric: Metric,
    *,
    batch_size: int,
    select: str | int | None = None,
    against: Tensor | Literal["itself"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a module or session.

    Args:
        predict: Called with a batch's inputs.
        split: The examples.
        metric: What to compute.
        batch_size: Use the deployed one for deployed models: some answer differently in other batches.
        select: Which output counts.
        against: For metrics that compare with the original: its outputs `[N, …]`, or `itself` when this is it.
        progress: `(examples done, examples in all)`.

    Raises:
        NonFiniteError: naming split and batch, if an output is NaN or Inf.
        DataError: likewise, if the labels do not fit the metric.
    """
    statistics, labels, predictions, confidences = [], [], [], []
    done = 0
    with torch.no_grad():
        for index, batch in enumerate(split.batches(batch_size)):
            output = torch.as_tensor(select_output(batch.call(predict), select))
            _check_finite(output, split, index)
            if against is None:
                expected = batch.labels
            else:
                expected = output if isinstance(against, str) else against[done : done + len(batch)]
            statistics.append(_statistic(metric, output, expected, f"split {split.name!r}, batch {index}"))
            if expected is not None:
                labels.append(expected)
            if output.ndim == 2 and output.shape[1] > 1:
                confidence, prediction = output.float().softmax(1).max(1)
                predictions.append(prediction)
                confidences.append(confidence)
            done += len(batch)
            if progress is not None:
                progress(done, len(split))
    statistic, all_labels = torch.cat(statistics), _joined(labels)
    return Evaluation(
        value=metric.value(statistic, all_labels),
        statistic=statistic,
        labels=all_labels,
        predictions=_joined(predictions),
        confidences=_joined(confidences),
    )


def scores(evaluation: Evaluation, metric: Metric) -> Tensor:
    """Per-example scores `[N]`, higher is better."""
    per_example = (
        evaluation.statistic.double().flatten(1).mean(1)
        if evaluation.statistic.ndim > 1
        else (evaluation.statistic.double())
    )
    return per_example if metric.higher_is_better else -per_example


def score_bounds(metric: Metric) -> tuple[float, float] | None:
    """Bounds of `scores`."""
    if metric.bounds is None or metric.higher_is_better:
        return metric.bounds
    return -metric.bounds[1], -metric.bounds[0]


def _statistic(metric: Metric, output: Tensor, expected: Tensor | None, where: str) -> Tensor:
    try:
        return metric.statistic(output, expected)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def _check_finite(output: Tensor, split: Split, index: int) -> None:
    if output.is_floating_point() and not bool(torch.isfinite(output).all()):
        bad = int((~torch.isfinite(output)).sum())
        raise NonFiniteError(
            f"the model's output on split {split.name!r}, batch {index}, has {bad} NaN or Inf of {output.numel()} "
            "values; check its weights and this batch"
        )
