"""Metrics: what "accuracy" means for a task.

A metric is a per-example statistic and an aggregate of it. Where the aggregate is the plain mean and the
statistic is bounded, the drop can be certified exactly; otherwise by bootstrap.

Shapes: `N` examples, `B` batch, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import ConfigError, DataError, NonFiniteError

Statistic = Callable[[Tensor, "Tensor | None"], Tensor]
Aggregate = Callable[[Tensor, "Tensor | None"], float]


def _mean(statistic: Tensor, labels: Tensor | None) -> float:
    return float(statistic.double().mean())


@dataclass(frozen=True)
class Metric:
    """A named metric with a direction.

    Attributes:
        name: What the report calls it.
        statistic: `(outputs [B, …], labels [B, …] or None) -> [B, …]`, computed batch by batch.
        aggregate: `(statistic [N, …], labels [N, …] or None) -> float`; None means the mean.
        higher_is_better: The direction.
        bounds: Range of the per-example statistic where it is known to be bounded, else None.
        needs_labels: Whether it can be computed only with labels.
        against_original: The labels are the original model's outputs (agreement, cosine).
    """

    name: str
    statistic: Statistic
    aggregate: Aggregate | None = None
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    needs_labels: bool = True
    against_original: bool = False

    @property
    def per_example(self) -> bool:
        """Whether the metric is the mean of a per-example score."""
        return self.aggregate is None

    def value(self, statistic: Tensor, labels: Tensor | None) -> float:
        """The metric over all examples; raises `NonFiniteError` if it is NaN or Inf."""
        result = float((self.aggregate or _mean)(statistic, labels))
        if not math.isfinite(result):
            raise NonFiniteError(
                f"metric {self.name!r} returned {result} on {len(statistic)} examples, expected a finite number; "
                "check the model's outputs and the metric function"
            )
        return result


def check_labels(outputs: Tensor, labels: Tensor | None, name: str) -> Tensor:
    """Raises `DataError` unless every label is a valid class index of `outputs [B, C, …]`."""
    if labels is None:
        raise DataError(f"metric {name!r} needs labels, but the split has none; use metric='agreement'")
    classes = outputs.shape[-1]
    if labels.is_floating_point():
        raise DataError(f"metric {name!r} needs integer class labels, got {labels.dtype}")
    outside = (labels < 0) | (labels >= classes)
    if bool(outside.any()):
        index = int(outside.flatten().nonzero()[0])
        raise DataError(
            f"labels must be in 0..{classes - 1} (the model has {classes} outputs), got "
            f"{int(labels.flatten()[index])} at position {index} of a batch"
        )
    return labels


def _top1(outputs: Tensor, labels: Tensor | None) -> Tensor:
    return (outputs.argmax(-1) == check_labels(outputs, labels, "top1")).double()


def _agreement(outputs: Tensor, original: Tensor | None) -> Tensor:
    assert original is not None  # noqa: S101 - `evaluate` always hands the original's outputs in
    return (outputs.argmax(-1) == original.argmax(-1)).double()


def _cosine(outputs: Tensor, original: Tensor | None) -> Tensor:
    assert original is not None  # noqa: S101 - as above
    return functional.cosine_similarity(outputs.flatten(1).double(), original.flatten(1).double(), dim=1)


def _predicted(outputs: Tensor, labels: Tensor | None) -> Tensor:
    check_labels(outputs, labels, "f1")
    return outputs.argmax(-1)


def _macro_f1(predicted: Tensor, labels: Tensor | None) -> float:
    assert labels is not None  # noqa: S101 - checked batch by batch
    classes = int(torch.maximum(predicted.max(), labels.max())) + 1
    confusion = torch.bincount(labels.flatten() * classes + predicted.flatten(), minlength=classes**2)
    confusion = confusion.reshape(classes, classes).double()
    both = confusion.sum(0) + confusion.sum(1)
    present = both > 0
    return float((2 * confusion.diagonal()[present] / both[present]).mean())


def _nll(outputs: Tensor, labels: Tensor | None) -> Tensor:
    checked = check_labels(outputs, labels, "perplexity")
    losses = functional.cross_entropy(outputs.flatten(0, -2).double(), checked.flatten(), reduction="none")
    return losses.reshape(len(outputs), -1).mean(1)


def _perplexity(nll: Tensor, labels: Tensor | None) -> float:
    return float(nll.double().mean().exp())  # infinite where it overflows, which `value` refuses


METRICS = {
    "top1": Metric("top1", _top1, bounds=(0.0, 1.0)),
    "agreement": Metric("agreement", _agreement, bounds=(0.0, 1.0), needs_labels=False, against_original=True),
    "cosine": Metric("cosine", _cosine, bounds=(-1.0, 1.0), needs_labels=False, against_original=True),
    "f1": Metric("f1", _predicted, _macro_f1),
    "perplexity": Metric("perplexity", _nll, _perplexity, higher_is_better=False),
}


def as_metric(metric: str | Metric | Callable[[Tensor, Tensor], float]) -> Metric:
    """Resolves a name, a `Metric`, or a function `(outputs [N, …], labels [N, …]) -> float` (higher is better)."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ConfigError(f"Task.metric: expected one of {sorted(METRICS)}, a Metric or a function, got {metric!r}")
        return METRICS[metric]
    if not callable(metric):
        raise ConfigError(f"Task.metric: expected a name, a Metric or a function, got {type(metric).__name__}")
    function = metric

    def aggregate(outputs: Tensor, labels: Tensor | None) -> float:
        if labels is None:
            raise DataError("the metric function needs labels, but the split has none")
        return float(function(outputs, labels))

    return Metric(getattr(metric, "__name__", "metric"), lambda outputs, labels: outputs, aggregate)
