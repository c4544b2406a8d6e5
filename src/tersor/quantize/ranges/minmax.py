"""The whole range: nothing saturates. Jacob et al. 2018, https://arxiv.org/abs/1712.05877."""

from __future__ import annotations

from tersor.core.quantization import QuantScheme
from tersor.probe import Histogram


def minmax(histogram: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    """``[min x, max x]``."""
    return histogram.low, histogram.high
