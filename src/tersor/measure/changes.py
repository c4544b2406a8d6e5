"""What changed for the people who use the model: flips, classes, calibration.

Shapes: `N` examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.report import Changes, ClassChange
from tersor.measure.accuracy import Evaluation

BINS = 15


def changes(before: Evaluation, after: Evaluation, class_names: tuple[str, ...] = ()) -> Changes | None:
    """Compares two models on the same examples; None unless both predict classes."""
    if before.predictions is None or after.predictions is None:
        return None
    flips = int((before.predictions != after.predictions).sum())
    labels = before.labels
    if labels is None or labels.is_floating_point() or labels.shape != before.predictions.shape:
        return Changes(n=len(before.predictions), flips=flips)
    right_before, right_after = before.predictions == labels, after.predictions == labels
    per_class = []
    for label in torch.unique(labels).tolist():
        chosen = labels == label
        name = class_names[label] if label < len(class_names) else str(label)
        per_class.append(
            ClassChange(
                name=name,
                n=int(chosen.sum()),
                before=float(right_before[chosen].double().mean()),
                after=float(right_after[chosen].double().mean()),
            )
        )
    return Changes(
        n=len(labels),
        flips=flips,
        right_to_wrong=int((right_before & ~right_after).sum()),
        wrong_to_right=int((~right_before & right_after).sum()),
        per_class=per_class,
        calibration_error_before=calibration_error(before.confidences, right_before),
        calibration_error_after=calibration_error(after.confidences, right_after),
    )


def calibration_error(confidences: Tensor | None, right: Tensor) -> float | None:
    """Expected calibration error with 15 equal-width bins: ``Σ n_b/N · |accuracy_b − confidence_b|``.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599. `confidences`, `right`: `[N]`.
    """
    if confidences is None:
        return None
    bins = (confidences.double() * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - confidences.double())
    return float(gaps.abs().sum() / len(confidences))
