"""Shrinks the range until rounding and saturation together cost least. Nagel et al. 2021, section 3.1.

See https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.ranges.base import Points, codes_of, narrowed


def mse(points: Points, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """``argmin_a Σ counts · (x − Q_a(x))²`` over the ranges ``a · [min x, max x]``, a in [0.04 … 1]."""
    peak = torch.maximum(points.low.abs(), points.high.abs())
    peak = peak.clamp(min=torch.finfo(peak.dtype).tiny)[:, None]  # squares shall neither overflow nor vanish

    def cost(low: Tensor, high: Tensor) -> Tensor:
        codes, scale, zero_point = codes_of(points.values, low, high, scheme)
        errors = ((codes - zero_point) * (scale / peak) - points.values / peak).square()
        return (errors * points.counts).sum(-1)

    return narrowed(points, cost)
