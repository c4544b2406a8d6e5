"""The entrance of every format: a checked tensor as rows that are worked on in float32, or float64 if it is float64.

Shapes: `R` regions that have a scale each, `N` entries of a region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError, NonFiniteError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where the arithmetic of a format is done."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def regions(tensor: Tensor, granularity: Granularity, caller: str) -> Tensor:
    """The regions of a tensor, `[R, N]`, without gradients.

    Raises:
        ConfigError: if it is no tensor of float16, bfloat16, float32 or float64, or the granularity does not fit.
        NonFiniteError: naming the first NaN or Inf.
    """
    if tensor.dtype not in DTYPES:
        raise ConfigError(f"{caller}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}; cast first")
    tensor = tensor.detach()
    finite = tensor.isfinite()
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        where = tuple(bad[0].tolist())
        raise NonFiniteError(
            f"{caller}: {len(bad)} of {tensor.numel()} values of a tensor of shape {tuple(tensor.shape)} are NaN or "
            f"Inf, the first at {where}: {float(tensor[where])}; repair the tensor before it is quantized"
        )
    return granularity.rows(tensor).to(working_dtype(tensor.dtype))


def absmax(rows: Tensor) -> Tensor:
    """Largest magnitude of each region, `[R]`; 0 of an empty one."""
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def positive(scale: Tensor) -> Tensor:
    """A scale that can be divided by: regions of zeros have one too."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
