"""Layers to round: weights, correlated inputs, and the methods that look at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.rounding import WeightGrid, adaround, gptq, obq
from zoo import normal

SYMMETRIC = QuantScheme(bits=3, signed=True, symmetric=True)
AFFINE = QuantScheme(bits=3)


def inputs(columns: int, rows: int, seed: int = 0) -> Tensor:
    """Correlated inputs, `[N, K]`."""
    return normal(rows, columns, seed=seed + 100) @ normal(columns, columns, seed=seed + 200) / columns**0.5


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def unequal(x: Tensor, seed: int = 0) -> Tensor:
    """The same with columns of very different size."""
    return x * normal(x.shape[1], seed=seed + 300).exp()


# What data decide, from weight, inputs and grid.
METHODS: dict[str, Callable[[Tensor, Tensor, WeightGrid], Tensor]] = {
    "gptq": lambda weight, x, grid: gptq(weight, gram_of(x), grid),
    "gptq in order": lambda weight, x, grid: gptq(weight, gram_of(x), grid, act_order=False),
    "obq": lambda weight, x, grid: obq(weight, gram_of(x), grid),
    "adaround": lambda weight, x, grid: adaround(weight, x, grid, steps=150, batch=32),
}


def textbook(weight: Tensor, gram: Tensor, grid: WeightGrid, choose: Callable[[Tensor, Tensor, Tensor], int]) -> Tensor:
    """Rounds one weight after the other and repairs the rest, with an inverse of its own at every step, in float64.

    `choose(errors, pivots, steps)` says which of the weights that are left is next.
    """
    work, columns = weight.double().clone(), weight.shape[1]
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(columns)
    scale, zero_point = grid.expanded(columns)
    for row in range(len(work)):
        left = list(range(columns))
        while left:
            inverse = torch.linalg.inv(hessian[left][:, left])
            codes = (work[row, left] / scale[row, left]).round() + zero_point[row, left]
            codes = codes.clamp(grid.scheme.qmin, grid.scheme.qmax)
            nearest = (codes - zero_point[row, left]) * scale[row, left]
            errors = work[row, left] - nearest
            index = choose(errors, inverse.diagonal(), scale[row, left])
            work[row, left] -= errors[index] / inverse[index, index] * inverse[index]
            work[row, left[index]] = nearest[index]
            left.pop(index)
    return work
