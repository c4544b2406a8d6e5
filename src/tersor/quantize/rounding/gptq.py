"""GPTQ: one sweep over the columns; each row repairs its rounding errors in the columns that are still to come.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323. Rounding column `j` to ``q_j`` errs by
``e = (w_j − q_j) / U_jj``, and the columns behind it become ``w − e · U[j, j+1:]``, where ``Uᵀ U = (gram + λ I)⁻¹``.
All rows share one order and so one factorisation.

Shapes: `O` outputs (rows), `K` columns, `b` columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.probe.hessian import DAMPING, inverse_upper
from tersor.quantize.rounding.base import WeightGrid, least_error, problem, rounded

BLOCK = 128


def gptq(weight: Tensor, gram: Tensor, grid: WeightGrid, *, damping: float = DAMPING, act_order: bool = True) -> Tensor:
    """Rounds a weight so that its layer's outputs change little: ``min tr(Δ · gram · Δᵀ)``, greedily.

    The grid stays as it is, also in groups (the paper's code calls that static groups), so the order of columns is
    free. A row for which rounding to nearest errs less keeps that: the result is never worse. Takes time
    ``O(K³ + O · K²)``.

    Args:
        weight: `[O, K]`.
        gram: `[K, K]`, ``X Xᵀ / n`` of the layer's inputs.
        grid: What to round to.
        damping: λ as a share of the mean diagonal of the Gram matrix.
        act_order: Columns with the largest inputs first, while there is most left to repair them; otherwise from the
            first to the last.

    Returns:
        `[O, K]`, points of the grid in the weight's type.

    Raises:
        ConfigError: if the shapes do not fit.
        NonFiniteError: for NaN or Inf.
    """
    work, gram = problem(weight, gram, grid)
    columns = work.shape[1]
    order = torch.arange(columns, device=work.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    upper = inverse_upper(gram[order][:, order], damping)
    work = work.T[order]  # [K, O]: a column of the weight is one piece of memory
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        part, local = work[start:stop], upper[start:stop, start:stop]  # views
        scale, zero_point = (found.T.contiguous() for found in grid.columns(order[start:stop], columns))
        errors = torch.empty_like(part)
        for column in range(stop - start):
            value = rounded(part[column], scale[column], zero_point[column], grid.scheme)
            errors[column] = (part[column] - value) / local[column, column]
            part[column] = value
            part[column + 1 :] -= local[column, column + 1 :, None] * errors[column]
        work[stop:] -= upper[start:stop, stop:].T @ errors
    values = torch.empty_like(work)
    values[order] = work
    return least_error(weight, gram, values.T.to(weight.dtype), grid.nearest(weight))
