"""Powers of two, and sums of few of them: multiplying becomes shifting.

Zhou et al. 2017 (INQ), https://arxiv.org/abs/1702.03044, after Miyashita et al. 2016, https://arxiv.org/abs/1603.01025;
Li et al. 2020 (APoT), https://arxiv.org/abs/1909.13144.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError
from tersor.quantize.formats.grids import LevelGrid
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.regions import absmax, positive, regions


def power_of_two_levels(bits: int) -> Tensor:
    """``{0, ±2⁰, ±2⁻¹, …, ±2^(1 − 2^(bits − 2))}``, ascending: `[2^(bits − 1) + 1]`, float64.

    Example:
        >>> power_of_two_levels(3)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000], dtype=torch.float64)
    """
    _check_bits("power_of_two", bits)
    return _signed([2.0**-exponent for exponent in range(2 ** (bits - 2))])


def power_of_two(tensor: Tensor, bits: int = 4, *, granularity: Granularity | str = "tensor") -> Quantized:
    """INQ: the nearest of 0 and ``±2^n2 … ±2^n1``, without its retraining.

    ``n1 = ⌊log₂(4/3 · max |x|)⌋``, ``n2 = n1 + 1 − 2^(bits − 2)``. As in the paper one of the bits only tells zero
    from the rest. More bits reach further down, they are not finer.

    Args:
        tensor: Any shape.
        bits: 2 to 8.
        granularity: What shares a largest power.

    Raises:
        ConfigError: for a wrong setting.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> power_of_two(torch.tensor([0.9, 0.3, -0.02])).dequantize()
        tensor([1.0000, 0.2500, 0.0000])
    """
    levels, shared = power_of_two_levels(bits), Granularity.of(granularity)
    rows = regions(tensor, shared, "power_of_two")
    limits = torch.finfo(rows.dtype)
    largest = absmax(rows)
    exponent = torch.frexp(largest / 3).exponent + 1  # |x| / 3 in [2^(e − 1), 2^e), so 4/3 |x| in [2^(e + 1), …)
    exponent = exponent.clamp(math.frexp(limits.tiny)[1] - 1, math.frexp(limits.max)[1] - 1)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return Quantized.of(tensor, LevelGrid("power of two", bits, levels.to(rows)), shared, scale)


def additive_levels(bits: int, base_bits: int = 2) -> Tensor:
    """All sums of `n` powers of two, with sign, the largest being 1: ascending `[2^bits − 1]`, float64.

    ``± γ Σ_{i < n} p_i``, ``p_i ∈ {0, 2^−i, 2^−(i + n), …, 2^−(i + (2^k − 2) n)}``, with ``k = base_bits`` and
    ``n = (bits − 1) / k``. For an odd number of magnitude bits and ``k = 2`` one more term of one bit,
    ``{0, 2^−2n}``, stands between: ``p_i ∈ {0, 2^−i, 2^−(i + n), 2^−(i + 2n + 1)}``. With ``k = 1`` the levels are
    uniform, with ``k = bits − 1`` powers of two.

    Raises:
        ConfigError: if `base_bits` is not 2 and does not divide ``bits − 1``.

    Example:
        >>> additive_levels(4)[7:]
        tensor([0.0000, 0.1000, 0.2000, 0.3000, 0.4000, 0.6000, 0.8000, 1.0000],
               dtype=torch.float64)
    """
    _check_bits("additive_powers_of_two", bits)
    count, rest = divmod(bits - 1, base_bits) if base_bits > 0 else (0, 1)
    if rest and base_bits != 2:
        raise ConfigError(
            f"additive_powers_of_two: expected base_bits that divide the {bits - 1} bits of a magnitude, or 2, got "
            f"{base_bits}"
        )
    steps = [step * count + (rest if step >= 2 else 0) for step in range(2**base_bits - 1)]
    terms = [[0.0, *(2.0 ** -(first + step) for step in steps)] for first in range(count)]
    if rest:
        terms.append([0.0, 2.0 ** (-2 * count)])
    sums = {sum(chosen) for chosen in itertools.product(*terms)}
    return _signed([value / max(sums) for value in sums if value])


def additive_powers_of_two(
    tensor: Tensor, bits: int = 4, *, base_bits: int = 2, granularity: Granularity | str = "tensor"
) -> Quantized:
    """APoT: ``α · level`` with ``α = max |x|``, where the paper learns `α` in training.

    Args:
        tensor: Any shape.
        bits: 2 to 8, the sign being one.
        base_bits: Of one term.
        granularity: What shares an `α`.

    Raises:
        ConfigError: for a wrong setting.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> additive_powers_of_two(torch.tensor([1.0, 0.3, -0.07])).dequantize()
        tensor([ 1.0000,  0.3000, -0.1000])
    """
    levels, shared = additive_levels(bits, base_bits), Granularity.of(granularity)
    rows = regions(tensor, shared, "additive_powers_of_two")
    grid = LevelGrid("additive powers of two", bits, levels.to(rows))
    return Quantized.of(tensor, grid, shared, positive(absmax(rows)))


def _signed(magnitudes: list[float]) -> Tensor:
    return torch.tensor(sorted([*(-value for value in magnitudes), 0.0, *magnitudes]), dtype=torch.float64)


def _check_bits(caller: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ConfigError(f"{caller}: expected 2 to 8 bits, got {bits}")
