"""A weight as a matrix, and what "the lowest share" means.

Shapes: `O` outputs, `K` columns, `I` inputs (input channels of one group of a convolution).
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(weight: Tensor, output_dim: int = 0) -> Tensor:
    """`[O, K]`, the inputs fastest: a kernel `[O, I, h, w]` becomes `[O, h · w · I]`.

    So neighbouring columns are input channels at one place of the kernel, which is what kernels for sparse
    convolutions take.
    """
    moved = weight.movedim(output_dim, 0)
    return moved.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, weight: Tensor, output_dim: int = 0) -> Tensor:
    """The inverse of `as_matrix`: of the shape of `weight`, contiguous."""
    outputs, inputs, *kernel = weight.movedim(output_dim, 0).shape
    return matrix.reshape(outputs, *kernel, inputs).movedim(-1, 1).movedim(0, output_dim).contiguous()


def columns_of(weight: Tensor, output_dim: int = 0) -> Tensor:
    """Where the columns of `as_matrix` stand in the order `I · h · w` of Gram matrices, `[K]`."""
    _, *rest = weight.movedim(output_dim, 0).shape
    size = torch.Size(rest).numel()
    return torch.arange(size).reshape(rest).movedim(0, -1).flatten()


def lowest(scores: Tensor, amount: float) -> Tensor:
    """Keep-mask of `scores`' shape that loses the ``round(amount · n)`` lowest; among equals the first."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[: round(amount * scores.numel())]] = False
    return keep.reshape(scores.shape)
