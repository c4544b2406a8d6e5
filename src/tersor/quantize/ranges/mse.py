"""Shrinks the range until rounding and saturation together cost least. Nagel et al. 2021, section 3.1.

See https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

import torch

from tersor.core.quantization import QuantScheme
from tersor.probe import Histogram

CANDIDATES = 64


def mse(histogram: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    """``argmin_a Σ counts · (x − Q_a(x))²`` over the ranges ``a · [min x, max x]``, a in (0.04 … 1].

    Both ends shrink together; zero stays representable, so a range that starts at zero still does.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if high <= low:
        return low, high
    levels = scheme.qmax - scheme.qmin
    shrink = torch.linspace(1.0, 0.04, CANDIDATES, dtype=torch.float32)[:, None]
    lows, highs = low * shrink, high * shrink
    if scheme.symmetric:
        highs = torch.maximum(-lows, highs)
        scale = highs / scheme.qmax
        zero_point = torch.zeros_like(scale)
    else:
        scale = (highs - lows) / levels
        zero_point = (scheme.qmin - lows / scale).round()
    values = histogram.centres.float()[None]
    codes = ((values / scale).round() + zero_point).clamp(scheme.qmin, scheme.qmax)
    errors = ((codes - zero_point) * scale - values).square() @ histogram.counts.float()
    best = float(shrink[int(errors.argmin())])
    return low * best, high * best
