"""Cuts the rarest values off both ends. Wu et al. 2020, https://arxiv.org/abs/2004.09602."""

from __future__ import annotations

import torch

from tersor.core.quantization import QuantScheme
from tersor.probe import Histogram

KEPT = 0.9999


def percentile(histogram: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    """The interval that holds 99.99 % of the values, half of the rest cut at each end."""
    cumulative = torch.cumsum(histogram.counts, 0) / histogram.counts.sum()
    step = (histogram.high - histogram.low) / len(cumulative)
    first = int((cumulative > (1 - KEPT) / 2).nonzero()[0])
    last = int((cumulative >= (1 + KEPT) / 2 - 1e-12).nonzero()[0])
    return histogram.low + step * first, histogram.low + step * (last + 1)
