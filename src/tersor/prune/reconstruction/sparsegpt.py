"""SparseGPT: one sweep over the columns; each row repairs what it loses in the columns that are still to come.

Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774. All rows share one order and so one factorisation, which
makes it `O(K³ + O · K²)` where optimal brain compression takes `O(O · K³)`.

Shapes: `O` outputs (rows), `K` columns, `b` columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.probe.hessian import DAMPING, checked, inverse_upper
from tersor.prune.reconstruction.removals import removals

BLOCK = 128


def prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Zeroes weights column by column and repairs the columns to the right.

    With `sparsity`, the weights of a block of columns that cost least are chosen together, the same share in every
    block; with `n_m`, `n` of every `m` consecutive weights of each row stay.

    Args:
        weight: `[O, K]`.
        gram: `[K, K]`.
        sparsity: Share of zeros, in [0, 1).
        n_m: How many are kept, of how many.
        damping: λ as a share of the mean diagonal of the Gram matrix.

    Returns:
        The new weight, of the weight's type, and its mask, True where kept.

    Raises:
        ConfigError: if shapes, sparsity or pattern are wrong.
    """
    removals(weight.shape[-1], sparsity, n_m)
    work = checked(weight, gram)
    columns = work.shape[1]
    # Row j of the upper factor U of (gram + λI)⁻¹ = UᵀU, from its diagonal on, is row j of the inverse of what is
    # left of the Hessian once all columns before j are fixed, divided by the root of its first entry.
    upper = inverse_upper(gram.to(work.dtype), damping)
    mask = torch.ones_like(work, dtype=torch.bool)
    block = BLOCK if n_m is None else max(1, BLOCK // n_m[1]) * n_m[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, keep = work[:, start:stop], mask[:, start:stop]  # views
        local = upper[start:stop, start:stop]
        if sparsity is not None:
            done = round(sparsity * work.shape[0] * start)
            keep[:] = _cheapest(part, local.diagonal(), round(sparsity * work.shape[0] * stop) - done)
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            if n_m is not None and column % n_m[1] == 0:
                group = slice(column, column + n_m[1])
                keep[:, group] = _best_of(part[:, group] / local.diagonal()[group], n_m[0])
            errors[:, column] = torch.where(keep[:, column], 0, part[:, column]) / local[column, column]
            part[:, column:] -= errors[:, column, None] * local[column, column:]
            part[:, column].masked_fill_(~keep[:, column], 0)
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return work.to(weight.dtype), mask


def _cheapest(weight: Tensor, pivots: Tensor, removed: int) -> Tensor:
    """Mask of a block that loses exactly the `removed` weights of least ``(w / u_jj)²``."""
    mask = torch.ones_like(weight, dtype=torch.bool).flatten()
    mask[(weight / pivots).abs().flatten().argsort(stable=True)[:removed]] = False
    return mask.reshape(weight.shape)


def _best_of(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.abs().topk(count, dim=1).indices, True)
