"""Labels: which entries of which dimensions must go together.

Every entry of every dimension of every parameter has a label, a positive integer. A tensor that flows through the
model carries *blocks*: label tensors with as many dimensions as the tensor, of size 1 along the dimensions that
the block says nothing about. A block of shape `[1, C, 1, 1]` says: channel `c` goes when label `c` goes. A block of
shape `[1, 1, H, D]` belongs to a dimension that was split in two. The *support* of a block is the set of its
dimensions that are larger than 1; the supports of a tensor's blocks are disjoint. A dimension that no block covers
is fixed, and so is label 0.

Operators only ever do two things: they say that two labels are the same (`Ledger.unite`), or that one may never go
(`Ledger.freeze`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Blocks = tuple[Tensor, ...]
FIXED = 0


@dataclass
class Ledger:
    """Hands out labels and records what is the same and what is frozen.

    Attributes:
        count: Labels handed out, the fixed label 0 included.
        where: Name of the operator and module at work, for reasons.
    """

    count: int = 1
    where: str = ""
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _known: tuple[tuple[int, int], np.ndarray[tuple[int], np.dtype[np.int32]]] | None = None

    def fresh(self, size: int) -> Tensor:
        """New labels, `[size]`."""
        labels = torch.arange(self.count, self.count + size)
        self.count += size
        return labels

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Entries of two label tensors (of shapes that broadcast) go together; whatever meets label 0 is frozen."""
        if left.shape != right.shape:
            left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
        different = left != right
        if not bool(different.any()):
            return
        left, right = left[different], right[different]
        fixed = (left == FIXED) | (right == FIXED)
        if bool(fixed.any()):
            self.freeze(torch.maximum(left, right)[fixed], "it meets channels that are fixed")
            left, right = left[~fixed], right[~fixed]
        self._pairs.append((left, right))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These labels may never go. An empty reason is none that a user would want to read."""
        labels = labels.flatten()
        labels = labels[labels != FIXED]
        if labels.numel():
            self._frozen.append((labels.clone(), f"{reason} ({self.where})" if reason and self.where else reason))

    def classes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Label -> number of its class, `[count]`; not to be written to."""
        state = (self.count, len(self._pairs))
        if self._known is not None and self._known[0] == state:
            return self._known[1]
        if self._pairs:
            left = torch.cat([pair[0] for pair in self._pairs]).numpy()
            right = torch.cat([pair[1] for pair in self._pairs]).numpy()
        else:
            left = right = np.zeros(0, dtype=np.int64)
        links = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count))
        _, found = connected_components(links, directed=False)
        self._known = (state, np.asarray(found))
        return self._known[1]

    def frozen(self, classes: np.ndarray[tuple[int], np.dtype[np.int32]]) -> dict[int, str]:
        """Class -> why it is frozen: the first reason that was given."""
        reasons: dict[int, str] = {int(classes[FIXED]): ""}
        for labels, reason in self._frozen:
            for number in np.unique(classes[labels.numpy()]).tolist():
                reasons[number] = reasons.get(number) or reason
        return reasons


@dataclass(frozen=True)
class Operand:
    """A tensor's shape and blocks, aligned to the dimensions of an operator's index space."""

    shape: tuple[int, ...]
    blocks: Blocks


def support(block: Tensor) -> frozenset[int]:
    """Dimensions that the block speaks about."""
    return frozenset(dim for dim, size in enumerate(block.shape) if size > 1)


def restrict(ledger: Ledger, block: Tensor, dims: Iterable[int], reason: str = "its dimension is fixed") -> Blocks:
    """Makes a block speak about `dims` only: labels that differ along the others go together from now on."""
    keep = support(block) & frozenset(dims)
    for dim in support(block) - keep:
        first = block.narrow(dim, 0, 1)
        ledger.unite(block, first)
        block = first
    if keep:
        return (block,)
    ledger.freeze(block, reason)
    return ()


def forbid(ledger: Ledger, blocks: Blocks, dim: int, reason: str) -> Blocks:
    """Nothing may be removed along `dim`: a block over it alone is frozen, a joint one falls back to the others."""
    result: list[Tensor] = []
    for block in blocks:
        if dim in support(block):
            result += restrict(ledger, block, support(block) - {dim}, reason)
        else:
            result.append(block)
    return tuple(result)


def axis(ledger: Ledger, blocks: Blocks, dim: int) -> Tensor | None:
    """The labels of one dimension by itself, `[size]`; None if it is fixed. Joint blocks are restricted to it."""
    for block in blocks:
        if dim in support(block):
            return restrict(ledger, block, {dim})[0].flatten()
    return None


def tie(ledger: Ledger, left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Two dimensions are one: their labels go together; a fixed one freezes the other."""
    if left is None or right is None:
        given = left if right is None else right
        if given is not None:
            ledger.freeze(given, "it meets a dimension that is fixed")
        return None
    ledger.unite(left, right)
    return left


def along(vector: Tensor | None, dim: int, ndim: int) -> Blocks:
    """Labels of one dimension as the block of a tensor with `ndim` dimensions."""
    if vector is None or vector.numel() < 2:
        return ()
    return (vector.reshape([-1 if index == dim else 1 for index in range(ndim)]),)


def compact(ledger: Ledger, block: Tensor) -> Blocks:
    """Drops the dimensions along which the labels do not change; a single label left over is frozen."""
    for dim in range(block.ndim):
        if block.shape[dim] > 1:
            first = block.narrow(dim, 0, 1)
            if block.stride(dim) == 0 or bool((block == first).all()):
                block = first
    if block.numel() > 1:
        return (block,)
    if block.numel():
        ledger.freeze(block, "a part of it is used by itself")
    return ()


def disjoint(ledger: Ledger, blocks: Sequence[Tensor], learned: int) -> Blocks:
    """Where supports overlap one block stays: what goes with a parameter (labels below `learned`), of that the first.

    The first dimension of the parameter, not of the tensor: then all that is made of `[width, heads, size]` agrees.
    """
    supports = [support(block) for block in blocks]
    if sum(len(dims) for dims in supports) == len(frozenset().union(*supports)):
        return tuple(sorted(blocks, key=lambda block: min(support(block))))
    classes = torch.from_numpy(ledger.classes())
    known = torch.zeros(ledger.count, dtype=torch.bool)
    known[classes[:learned]] = True
    known[classes[FIXED]] = False

    def rank(block: Tensor) -> tuple[bool, int]:
        labels = block[block != FIXED]
        return not bool(known[classes[labels]].any()), int(labels.min()) if len(labels) else ledger.count

    ranked = sorted(blocks, key=rank)
    taken: set[int] = set()
    result: list[Tensor] = []
    for block in ranked:
        if taken & support(block):
            ledger.freeze(block, "its dimension is merged with another one that can be cut")
        else:
            taken |= support(block)
            result.append(block)
    return tuple(result)


def unify(ledger: Ledger, operands: Sequence[Operand], apart: Iterable[int] = ()) -> Blocks:
    """What holds for entries that meet at one point of an index space: an element-wise operator, a contraction.

    Dimensions that some block joins are handled together. If all operands speak about the same of them, entry by
    entry is united. Otherwise only the outermost dimension stays that all of them can cut - this is what makes an
    attention head atomic - and the others are frozen.

    Args:
        ledger: Takes the result.
        operands: Of equal number of dimensions; sizes broadcast.
        apart: Dimensions that the operator treats by themselves (it sums or normalises over them), so that they
            cannot be cut jointly with another one.

    Returns:
        The blocks of the broadcast result.
    """
    apart, result = frozenset(apart), []
    for group in _components(operands):
        involved = [operand for operand in operands if any(operand.shape[dim] > 1 for dim in group)]
        found = [[block for block in operand.blocks if support(block) & group] for operand in involved]
        if all(len(blocks) == 1 and support(blocks[0]) == group for blocks in found) and (
            len(group) == 1 or not group & apart
        ):
            kept = [blocks[0] for blocks in found]
        else:
            kept = _outermost(ledger, group, involved, found)
        for block in kept[1:]:
            ledger.unite(kept[0], block)
        result += kept[:1]
    return tuple(result)


def _outermost(
    ledger: Ledger, group: frozenset[int], involved: Sequence[Operand], found: Sequence[list[Tensor]]
) -> list[Tensor]:
    for dim in sorted(group):
        needed = [index for index, operand in enumerate(involved) if operand.shape[dim] > 1]
        if needed and all(any(dim in support(block) for block in found[index]) for index in needed):
            break
    else:
        dim = -1
    kept: list[Tensor] = []
    for blocks in found:
        for block in blocks:
            kept += restrict(ledger, block, {dim}, "it meets a dimension that is fixed")
    return kept


def _components(operands: Sequence[Operand]) -> list[frozenset[int]]:
    """Sets of dimensions that blocks join, outermost first."""
    groups: list[frozenset[int]] = []
    for operand in operands:
        for block in operand.blocks:
            joined = support(block)
            touched = [group for group in groups if group & joined]
            groups = [group for group in groups if not group & joined] + [joined.union(*touched)]
    return sorted(groups, key=min)
