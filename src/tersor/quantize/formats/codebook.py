"""A table of its own for each region, found by k-means. Han et al. 2016 (Deep Compression).

``min Σ w · (x − c[q])²`` over the table `c` and the codes `q`. Without weights `w` as in
https://arxiv.org/abs/1510.00149; weighted by the diagonal of the loss's Hessian or Fisher information as in Choi et
al. 2017, https://arxiv.org/abs/1612.01543, and Kim et al. 2023 (SqueezeLLM), https://arxiv.org/abs/2306.07629.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError
from tersor.quantize.formats.grids import LevelGrid
from tersor.quantize.formats.kmeans import Initial, kmeans
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.regions import regions


def codebook(
    tensor: Tensor,
    bits: int = 4,
    *,
    granularity: Granularity | str = "tensor",
    weight: Tensor | None = None,
    initial: Initial = "linear",
    keep_zero: bool = False,
) -> Quantized:
    """Quantizes a tensor to ``2^bits`` numbers per region, which are stored in the tensor's own type.

    Args:
        tensor: Any shape.
        bits: 1 to 8.
        granularity: What shares a table.
        weight: The tensor's shape, not negative: how much an error of each entry counts.
        initial: Where k-means starts: `linear` over the range, which Han et al. found best, `quantile`, or `optimal`
            (exact for regions of up to 512 entries).
        keep_zero: One of the numbers is 0, so that what was pruned stays pruned.

    Raises:
        ConfigError: for a wrong setting, or weights that do not fit.
        NonFiniteError: for NaN or Inf.

    Example:
        >>> codebook(torch.tensor([0.0, 0.2, 1.0, 1.2]), bits=1).dequantize()
        tensor([0.1000, 0.1000, 1.1000, 1.1000])
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"codebook: expected 1 to 8 bits, got {bits}")
    if initial not in get_args(Initial):
        raise ConfigError(f"codebook: expected initial to be one of {get_args(Initial)}, got {initial!r}")
    shared = Granularity.of(granularity)
    rows = regions(tensor, shared, "codebook")
    every = torch.ones_like(tensor) if weight is None else _checked(weight, tensor)
    weights = regions(every, shared, "codebook weight")  # what fills up a short last block weighs nothing
    if rows.numel():
        levels = kmeans(rows.double(), weights.double(), 1 << bits, initial=initial, keep_zero=keep_zero)
        limits = torch.finfo(tensor.dtype)
        levels = levels.clamp(limits.min, limits.max).to(tensor.dtype).to(rows.dtype)
    else:
        levels = rows.new_zeros(len(rows), 1 << bits)
    return Quantized.of(tensor, LevelGrid("codebook", bits, levels, tensor.element_size()), shared)


def _checked(weight: Tensor, tensor: Tensor) -> Tensor:
    if weight.shape != tensor.shape:
        raise ConfigError(
            f"codebook: expected weights of the tensor's shape {tuple(tensor.shape)}, got {tuple(weight.shape)}"
        )
    if bool((weight < 0).any()):
        raise ConfigError(f"codebook: expected weights that are not negative, got {float(weight.min())}")
    return weight
