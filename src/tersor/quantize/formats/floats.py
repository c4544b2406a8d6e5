"""Shorter floating-point numbers: float16, bfloat16, and the two of 8 bits.

| | exponent, mantissa bits | largest | smallest normal |
|---|---|---|---|
| float16 | 5, 10 | 65,504 | 2⁻¹⁴ |
| bfloat16 | 8, 7 | 3.4e38 | 2⁻¹²⁶ |
| E4M3 | 4, 3 | 448 (no Inf) | 2⁻⁶ |
| E5M2 | 5, 2 | 57,344 | 2⁻¹⁴ |

Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433; bfloat16: Kalamkar et al. 2019,
https://arxiv.org/abs/1905.12322.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError
from tersor.quantize.formats.grids import FloatGrid
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.regions import absmax, positive, regions

EIGHT_BITS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def float16(tensor: Tensor) -> Quantized:
    """IEEE half precision, without a scale; what is beyond ±65,504 saturates.

    Raises:
        NonFiniteError: for NaN or Inf.

    Example:
        >>> float16(torch.tensor([1e6, 0.1])).dequantize()
        tensor([6.5504e+04, 9.9976e-02])
    """
    return Quantized.of(tensor, FloatGrid("float16", torch.float16), Granularity())


def bfloat16(tensor: Tensor) -> Quantized:
    """The upper half of a float32, without a scale.

    Raises:
        NonFiniteError: for NaN or Inf.

    Example:
        >>> bfloat16(torch.tensor([0.1])).dequantize()
        tensor([0.1001])
    """
    return Quantized.of(tensor, FloatGrid("bfloat16", torch.bfloat16), Granularity())


def float8(
    tensor: Tensor,
    kind: Literal["e4m3", "e5m2"] = "e4m3",
    *,
    granularity: Granularity | str = "tensor",
    scaled: bool = True,
) -> Quantized:
    """Floats of 8 bits: ``s · fp8(x / s)`` with ``s = max |x| / largest``, saturating.

    Args:
        tensor: Any shape.
        kind: `e4m3` for weights and activations, `e5m2` where range matters more than precision (gradients).
        granularity: What shares a scale.
        scaled: False casts as it is, without scales.

    Raises:
        ConfigError: for a wrong setting.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> float8(torch.tensor([0.1, 1.0])).dequantize()
        tensor([0.0982, 1.0000])
    """
    if kind not in EIGHT_BITS:
        raise ConfigError(f"float8: expected one of {list(EIGHT_BITS)}, got {kind!r}")
    grid, shared = FloatGrid(f"float8 {kind}", EIGHT_BITS[kind]), Granularity.of(granularity)
    if not scaled:
        return Quantized.of(tensor, grid, Granularity())
    scale = absmax(regions(tensor, shared, "float8")) / torch.finfo(grid.storage).max
    return Quantized.of(tensor, grid, shared, positive(scale))
