"""The whole range: nothing saturates. Jacob et al. 2018, https://arxiv.org/abs/1712.05877."""

from __future__ import annotations

from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.ranges.base import Points


def minmax(points: Points, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """``[min x, max x]``."""
    return points.low, points.high
