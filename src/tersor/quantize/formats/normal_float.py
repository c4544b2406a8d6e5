"""Levels at the quantiles of a normal distribution, for weights that are distributed so. Dettmers et al. 2023 (QLoRA).

NF4 is the case of 4 bits. https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError
from tersor.quantize.formats.floats import float8
from tersor.quantize.formats.grids import LevelGrid
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.regions import absmax, positive, regions

BLOCK = Granularity.block(64)
SCALE_BLOCK = Granularity.block(256)


def normal_levels(bits: int) -> Tensor:
    """``Φ⁻¹(p) / Φ⁻¹(1 − δ)`` at evenly spaced `p`, ascending: `[2^bits]`, float64, from −1 to 1.

    ``2^(bits − 1)`` of them from ``p = δ`` to ``½``, one more from there to ``1 − δ``, the zero in common;
    ``δ = ½ (1 / 2^(bits + 1) + 1 / (2^(bits + 1) − 2))``.

    Example:
        >>> normal_levels(2)
        tensor([-1.0000,  0.0000,  0.4358,  1.0000], dtype=torch.float64)
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"normal_float: expected 2 to 8 bits, got {bits}")
    half, twice = 2 ** (bits - 1), 2 ** (bits + 1)
    delta = (1 / twice + 1 / (twice - 2)) / 2
    below, above = (ndtri(np.linspace(1 - delta, 0.5, count)[:-1]) / ndtri(1 - delta) for count in (half, half + 1))
    return torch.from_numpy(np.concatenate([-below, [0.0], above[::-1]]))


def normal_float(
    tensor: Tensor, bits: int = 4, *, granularity: Granularity | str = BLOCK, double: bool = False
) -> Quantized:
    """``s · level`` with ``s = max |x|`` of a block.

    Args:
        tensor: Any shape.
        bits: 2 to 8.
        granularity: What shares a scale; in the paper 64 consecutive entries.
        double: Scales, less their mean, become E4M3 floats in blocks of 256: 8 bits each instead of 32.

    Raises:
        ConfigError: for a wrong setting.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> normal_float(torch.tensor([2.0, 0.5, -1.0])).dequantize()
        tensor([ 2.0000,  0.4922, -1.0501])
    """
    levels, shared = normal_levels(bits), Granularity.of(granularity)
    rows = regions(tensor, shared, "normal_float")
    grid, scale = LevelGrid(f"normal float {bits}", bits, levels.to(rows)), positive(absmax(rows))
    if not double or not len(scale):
        return Quantized.of(tensor, grid, shared, scale)
    mean = scale.mean()
    code = float8(scale - mean, granularity=SCALE_BLOCK)
    return replace(Quantized.of(tensor, grid, shared, positive(code.dequantize() + mean)), scale_code=code)
