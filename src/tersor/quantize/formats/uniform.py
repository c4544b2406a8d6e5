"""Integers in equal steps. Jacob et al. 2018, https://arxiv.org/abs/1712.05877.

``q = clamp(round(x / s) + z, qmin, qmax)``, ``x' = s · (q − z)``. Symmetric: ``z = 0``, ``s = max |x| / qmax``.
Affine: ``s = (max x − min x) / (qmax − qmin)``, ``z = round(qmin − min x / s)``. Nagel et al. 2021 tell when to take
which, https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError
from tersor.quantize import ranges
from tersor.quantize.formats.grids import IntegerGrid
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.regions import regions
from tersor.quantize.ranges.base import Points

RANGES = {
    "minmax": ranges.minmax,
    "percentile": ranges.percentile,
    "mse": ranges.mse,
    "entropy": ranges.entropy,
}


def uniform(
    tensor: Tensor,
    bits: int = 8,
    *,
    signed: bool = True,
    symmetric: bool = True,
    granularity: Granularity | str = "tensor",
    range_method: Literal["minmax", "percentile", "mse", "entropy"] = "minmax",
) -> Quantized:
    """Quantizes a tensor to integers.

    Zero is exact, an error inside the range is at most half a scale. Symmetric signed codes use ``−2^(bits − 1)`` only
    for what saturates, never under `minmax`.

    Args:
        tensor: Any shape; float16, bfloat16, float32 or float64.
        bits: 2 to 8, or 16.
        signed: Codes from ``−2^(bits − 1)``, otherwise from 0.
        symmetric: Without zero point; unsigned and symmetric is for values that are never negative.
        granularity: What shares a scale: `tensor`, `channel` (axis 0), `token`, or a `Granularity`.
        range_method: What the codes cover (`tersor.quantize.ranges`); what lies outside saturates.

    Raises:
        ConfigError: for a wrong setting, or negative values in an unsigned symmetric format.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> uniform(torch.tensor([-1.0, 0.5, 1.0])).codes
        tensor([-127,   64,  127], dtype=torch.int8)
    """
    shared = Granularity.of(granularity)
    scheme = QuantScheme(
        bits=bits,
        signed=signed,
        symmetric=symmetric,
        axis=shared.axis,
        group_size=shared.size,
        per_token=shared.kind == "token",
    )
    if range_method not in RANGES:
        raise ConfigError(f"uniform: expected a range method of {list(RANGES)}, got {range_method!r}")
    rows = regions(tensor, shared, "uniform")
    if symmetric and not signed and bool((rows < 0).any()):
        raise ConfigError(
            f"uniform: unsigned symmetric codes hold no negative values, got one of {float(rows.min())}; pass "
            "signed=True or symmetric=False"
        )
    if rows.numel():
        low, high = RANGES[range_method](Points.of_rows(rows), scheme)
    else:
        low = high = rows.new_zeros(len(rows))
    scale, zero_point = scheme.parameters(low, high, smallest=torch.finfo(rows.dtype).tiny)
    return Quantized.of(tensor, IntegerGrid(scheme, None if symmetric else zero_point[:, None]), shared, scale)
