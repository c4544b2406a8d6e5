"""What a range method sees: of each region, weighted values and their extremes.

Shapes: `R` regions that get a range each, `N` values of a region (the bins of a histogram, or the values themselves).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.probe import Histogram
from tersor.probe.histogram import SAMPLE

CANDIDATES = 64
NARROWEST = 0.04
AT_ONCE = 1 << 18  # numbers that are worked on together


RangeMethod = Callable[["Points", QuantScheme], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Points:
    """Values `[R, N]` and how often each occurs, over ranges whose ends are exact.

    Attributes:
        values: `[R, N]`.
        counts: `[R, N]`.
        low: Smallest value of each region, `[R]`.
        high: Largest value of each region, `[R]`.
        width: Each value stands for an interval of this width around it, `[R]`; 0 for exact values.
        average_low: Mean of the batches' smallest values, `[R]`, later batches weighing more.
        average_high: The same of the largest.
    """

    values: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor
    width: Tensor
    average_low: Tensor
    average_high: Tensor

    @classmethod
    def of_histogram(cls, histogram: Histogram) -> Points:
        """One region: the bins of a histogram."""
        ends = (histogram.low, histogram.high, histogram.average_low, histogram.average_high)
        low, high, average_low, average_high = torch.tensor(ends, dtype=torch.float64)[:, None]
        width = (high - low) / len(histogram.counts)
        return cls(histogram.centres[None], histogram.counts[None], low, high, width, average_low, average_high)

    @classmethod
    def of_rows(cls, rows: Tensor) -> Points:
        """A region per row of `[R, N]`, N > 0; of long rows an evenly spaced sample, their ends exact."""
        low, high = torch.aminmax(rows, dim=1)
        values = rows[:, :: max(1, rows.shape[1] // SAMPLE) | 1]
        return cls(values, torch.ones_like(values), low, high, torch.zeros_like(low), low, high)


def narrowed(points: Points, cost: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of each region the cheapest of the ranges ``a · [min x, max x]``, a from 1 down to 0.04.

    Zero is inside; both ends shrink together, so a range that starts at zero still does. Of equally cheap ones the
    widest.

    Args:
        points: The regions.
        cost: `(low, high) -> cost`, each `[A, R]`; called with several `a` at once while the points are few.
    """
    low, high = points.low.clamp(max=0), points.high.clamp(min=0)
    shares = torch.linspace(1.0, NARROWEST, CANDIDATES, dtype=low.dtype, device=low.device)
    at_once = max(1, AT_ONCE // max(1, points.values.numel()))
    costs = torch.cat([cost(low * some[:, None], high * some[:, None]) for some in torch.split(shares, at_once)])
    best = shares[costs.argmin(0)]
    return low * best, high * best


def codes_of(values: Tensor, low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[A, R, N]` of values `[R, N]` under the ranges `[A, R]`, with scale and zero point `[A, R, 1]`."""
    scale, zero_point = scheme.parameters(low, high, smallest=torch.finfo(low.dtype).tiny)
    scale, zero_point = scale[..., None], zero_point[..., None]
    return ((values / scale).round() + zero_point).clamp(scheme.qmin, scheme.qmax), scale, zero_point
