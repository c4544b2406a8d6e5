"""Blocks of the weight matrix go or stay as a whole. Gray et al. 2017; Lagunas et al. 2021.

https://arxiv.org/abs/2109.04838. Edges may be ragged: the last blocks of a row or column are then smaller.

Shapes: `O` outputs, `K` columns, `R` rows and `C` columns of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tersor.prune.patterns.base import lowest


def block_scores(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Mean score of every block, `[R, C]`; entries of ``−∞`` (gone before) count nothing, a block of them ``−∞``."""
    gone = scores == -torch.inf
    ones = torch.ones_like(scores)
    total = _sums(scores.masked_fill(gone, 0), rows, columns)
    size, left = _sums(ones, rows, columns), _sums(ones.masked_fill(gone, 0), rows, columns)
    return (total / size).masked_fill(left == 0, -torch.inf)


def spread(keep: Tensor, outputs: int, inputs: int, size: tuple[int, int]) -> Tensor:
    """A value per block `[R, C]` to a value per entry `[O, K]`."""
    rows, columns = size
    return keep.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]


def block(scores: Tensor, amount: float, rows: int, columns: int) -> Tensor:
    """Keep-mask `[O, K]` that loses the share `amount` of the blocks, the lowest mean scores first."""
    keep = lowest(block_scores(scores, rows, columns), amount)
    return spread(keep, scores.shape[0], scores.shape[1], (rows, columns))


def _sums(values: Tensor, rows: int, columns: int) -> Tensor:
    outputs, inputs = values.shape
    padded = functional.pad(values, (0, -inputs % columns, 0, -outputs % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).sum((1, 3))
