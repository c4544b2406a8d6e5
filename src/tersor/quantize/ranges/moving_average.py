"""The mean range of the batches, later ones weighing more: one outlier moves it little.

Jacob et al. 2018, section 3.1, https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.ranges.base import Points


def moving_average(points: Points, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """``m ← 0.9 · m + 0.1 · min x`` of each batch, the same for the largest; of values without batches `minmax`."""
    return points.average_low, points.average_high
