"""Cuts the rarest values off both ends. Wu et al. 2020, https://arxiv.org/abs/2004.09602."""

from __future__ import annotations

from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.ranges.base import Points

KEPT = 0.9999


def percentile(points: Points, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """The interval that holds 99.99 % of the values, half of the rest cut at each end."""
    values, order = points.values.sort(dim=1, stable=True)
    cumulative = points.counts.double().gather(1, order).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    first = (cumulative <= (1 - KEPT) / 2).sum(1, keepdim=True)
    last = (cumulative < (1 + KEPT) / 2 - 1e-12).sum(1, keepdim=True)
    low, high = values.gather(1, first)[:, 0] - points.width / 2, values.gather(1, last)[:, 0] + points.width / 2
    return low, high
