"""Optimal brain quantization: rounds the weight that costs least, repairs its row, and again, exactly.

Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580. Rounding weight `p` of a row to ``q_p`` costs
``(w_p − q_p)² / [H⁻¹]_pp`` and is repaired by ``w − (w_p − q_p) / [H⁻¹]_pp · H⁻¹[p]``; then ``H⁻¹`` loses `p` by one
step of elimination. We never form the updated inverses: elimination in the greedy order is a pivoted Cholesky
factorisation of ``H⁻¹``, of which one new row per step is enough. All rows share the one inverse in memory.

Shapes: `O` outputs (rows), `K` columns, `R` rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.probe.hessian import DAMPING, damped_inverse
from tersor.quantize.rounding.base import WeightGrid, least_error, problem, rounded

OUTLIER = 0.501  # steps: more than rounding errs by, so repairs have pushed the weight off the grid
CHUNK = 1 << 22  # numbers that the factors of a chunk of rows hold: about what a cache holds


def obq(weight: Tensor, gram: Tensor, grid: WeightGrid, *, damping: float = DAMPING) -> Tensor:
    """Rounds a weight so that its layer's outputs change little: ``min tr(Δ · gram · Δᵀ)``, each row in its own order.

    Weights that repairs have pushed off the grid come first, the costliest of them, before they go further. A row for
    which rounding to nearest errs less keeps that: the result is never worse. Takes time ``O(O · K³)``: for `K` up to
    about a thousand; `gptq` for larger layers.

    Args:
        weight: `[O, K]`.
        gram: `[K, K]`, ``X Xᵀ / n`` of the layer's inputs.
        grid: What to round to.
        damping: λ as a share of the mean diagonal of the Gram matrix.

    Returns:
        `[O, K]`, points of the grid in the weight's type.

    Raises:
        ConfigError: if the shapes do not fit.
        NonFiniteError: for NaN or Inf.
    """
    work, gram = problem(weight, gram, grid)
    inverse = damped_inverse(gram, damping)
    scale, zero_point = grid.expanded(work.shape[1])
    values = torch.empty_like(work)
    chunk = max(1, CHUNK // work.shape[1] ** 2)
    for start in range(0, len(work), chunk):
        rows = slice(start, start + chunk)
        values[rows] = _eliminate(work[rows], inverse, scale[rows], zero_point[rows], grid.scheme)
    return least_error(weight, gram, values.to(weight.dtype), grid.nearest(weight))


def _eliminate(weight: Tensor, inverse: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    rows, columns = weight.shape
    factors = weight.new_zeros(rows, columns, columns)  # rows of the pivoted Cholesky factor of the inverse
    pivots = inverse.diagonal().expand(rows, columns).clone()  # [H⁻¹]_pp as of now
    least = pivots.min() * torch.finfo(weight.dtype).eps
    # A power of two per row, so that squares neither overflow nor vanish.
    unit = torch.ldexp(torch.ones_like(weight[:, :1]), torch.frexp(weight.abs().amax(1, keepdim=True)).exponent)
    left = torch.ones_like(weight, dtype=torch.bool)
    every = torch.arange(rows, device=weight.device)
    for step in range(columns):
        nearest = rounded(weight, scale, zero_point, scheme)
        errors = weight - nearest
        costs = (errors / unit).square() / pivots
        outliers = left & (errors.abs() > OUTLIER * scale)
        first = torch.where(outliers, costs, -1).argmax(1)
        chosen = torch.where(outliers.any(1), first, costs.masked_fill(~left, torch.inf).argmin(1))[:, None]
        past = factors[:, :step]
        coefficients = past[every, :, chosen[:, 0]][:, None]  # [R, 1, T]
        row = (inverse[chosen[:, 0]] - torch.bmm(coefficients, past)[:, 0]) * left  # H⁻¹[p] as of now
        pivot = pivots.gather(1, chosen)
        weight = weight - (errors.gather(1, chosen) / pivot) * row
        weight = weight.scatter(1, chosen, nearest.gather(1, chosen))  # exactly, and for good: rows of `left` only
        left = left.scatter(1, chosen, False)
        factor = row / pivot.sqrt()
        factors[:, step] = factor
        pivots = (pivots - factor.square()).clamp_min_(least)
    return weight
