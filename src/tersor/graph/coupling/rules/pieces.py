"""Operators that take a dimension apart or put one together: slices, splits, concatenation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tersor.graph.coupling.integers import Attribute, Traced
from tersor.graph.coupling.labels import FIXED, Blocks, Operand, compact, disjoint, forbid, restrict, support, unify
from tersor.graph.coupling.rules.shape import move_labels
from tersor.graph.coupling.trace import Call, Rule, Trace


def _cut(trace: Trace, blocks: Blocks, dim: int, start: int, stop: int) -> Blocks:
    return move_labels(
        trace, blocks, lambda block: block.narrow(dim, start, stop - start) if block.shape[dim] > 1 else block
    )


def _ties(trace: Trace, blocks: Blocks, dim: int, pieces: int) -> None:
    """A dimension is cut into equal pieces by a number that follows its size: the same positions go in all."""
    for block in blocks:
        if dim in support(block):
            size = block.shape[dim] // pieces
            parts = block.reshape(*block.shape[:dim], pieces, size, *block.shape[dim + 1 :])
            trace.ledger.unite(parts, parts.narrow(dim, 0, 1))


def slicing(trace: Trace, call: Call) -> None:
    """`slice`: bounds must follow the size, or nothing can be cut along the dimension."""
    source = call.args[0]
    dim = int(call.argument(1, "dim", 0)) % source.ndim
    size = source.shape[dim]
    start, stop = call.argument(2, "start"), call.argument(3, "end")
    step = call.argument(4, "step", 1)
    start = 0 if start is None else int(start)
    stop = size if stop is None else min(int(stop), size)
    start, stop = (start + size if start < 0 else start), (stop + size if stop < 0 else stop)
    blocks = trace.blocks(source)
    if step != 1:
        blocks = forbid(trace.ledger, blocks, dim, "it is sliced with a step")
        trace.put(call.out, blocks)
        return
    if any(dim in support(block) for block in blocks):
        bounds = [bound for bound in (start, stop) if bound not in (0, size)]
        blocks = _follow(trace, blocks, dim, size, bounds)
    trace.put(call.out, _cut(trace, blocks, dim, min(start, size), max(stop, start)))


def _follow(trace: Trace, blocks: Blocks, dim: int, size: int, bounds: Sequence[int]) -> Blocks:
    """Makes sure that the bounds of a slice are computed from what may change."""
    given = trace.function[1] if trace.function is not None else []
    for bound in bounds:
        found = [number for number in given if abs(number) in (bound, size - bound)]
        traced = [number for number in found if isinstance(number, Traced)]
        if found and not traced:
            return forbid(trace.ledger, blocks, dim, f"it is sliced at {bound}, which is written in the code")
        number = traced[0] if traced else Traced(bound)
        if isinstance(number.origin, Attribute):
            for block in blocks:
                if dim in support(block):
                    part = block.narrow(dim, 0, bound) if number == bound else block.narrow(dim, bound, size - bound)
                    trace.require(number, (part,), dim)
        elif bound and size % bound == 0:
            _ties(trace, blocks, dim, size // bound)
        elif bound != size and size % (size - bound) == 0:
            _ties(trace, blocks, dim, size // (size - bound))
        else:
            return forbid(trace.ledger, blocks, dim, f"it is sliced at {bound}")
    return blocks


def select(trace: Trace, call: Call) -> None:
    """One entry by its number: nothing can be cut along that dimension."""
    source, dim = call.args[0], int(call.args[1]) % call.args[0].ndim
    blocks = forbid(trace.ledger, trace.blocks(source), dim, "an entry is selected by its number")
    trace.put(call.out, tuple(block.squeeze(dim) for block in blocks))


def unbind(trace: Trace, call: Call) -> None:
    """All entries one by one."""
    dim = int(call.argument(1, "dim", 0)) % call.args[0].ndim
    blocks = forbid(trace.ledger, trace.blocks(call.args[0]), dim, "its entries are used one by one")
    for out in call.out:
        trace.put(out, tuple(block.squeeze(dim) for block in blocks))


def split(trace: Trace, call: Call) -> None:
    """`split`, `chunk`, `split_with_sizes`: equal pieces lose the same positions; sizes may come from attributes."""
    source, outs = call.args[0], call.out
    dim = int(call.argument(2, "dim", 0)) % source.ndim
    sizes = [out.shape[dim] for out in outs]
    blocks = trace.blocks(source)
    if any(dim in support(block) for block in blocks):
        blocks = _split(trace, call, blocks, dim, sizes)
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    for out, (start, stop) in zip(outs, pairwise(bounds), strict=True):
        trace.put(out, _cut(trace, blocks, dim, start, stop))


def _split(trace: Trace, call: Call, blocks: Blocks, dim: int, sizes: list[int]) -> Blocks:
    chunked = trace.function is not None and trace.function[0] in ("chunk", "tensor_split", "unsafe_chunk")
    listed = isinstance(call.args[1], tuple | list)
    numbers = [Traced(size) for size in sizes] if chunked else trace.written(sizes if listed else [int(call.args[1])])
    if len(set(sizes)) == 1 and all(isinstance(number, Traced) for number in numbers):
        _ties(trace, blocks, dim, len(sizes))
    elif not listed:
        return forbid(trace.ledger, blocks, dim, "it is split into unequal pieces")
    start = 0
    for size, number in zip(sizes, numbers if listed else numbers * len(sizes), strict=False):
        part = _cut(trace, tuple(block for block in blocks if dim in support(block)), dim, start, start + size)
        trace.require(number, part, dim)
        start += size
    if not listed and not isinstance(numbers[0], Traced):
        return forbid(trace.ledger, blocks, dim, f"the size {numbers[0]} is written in the code")
    return blocks


def gate(trace: Trace, call: Call) -> None:
    """`glu`: the first half, gated by the second."""
    source = call.args[0]
    dim = int(call.argument(1, "dim", -1)) % source.ndim
    blocks = trace.blocks(source)
    _ties(trace, blocks, dim, 2)
    trace.put(call.out, _cut(trace, blocks, dim, 0, source.shape[dim] // 2))


def cat(trace: Trace, call: Call) -> None:
    """Labels side by side; the other dimensions must agree."""
    tensors = [tensor for tensor in call.args[0] if tensor.numel() or tensor.ndim > 1]
    dim = int(call.argument(1, "dim", 0)) % call.out.ndim
    trace.put(call.out, _side_by_side(trace, [trace.operand(tensor) for tensor in tensors], dim))


def stack(trace: Trace, call: Call) -> None:
    """Side by side along a new dimension, whose size the code decides."""
    dim = int(call.argument(1, "dim", 0)) % call.out.ndim
    operands = [
        Operand(
            (*tensor.shape[:dim], 1, *tensor.shape[dim:]), tuple(block.unsqueeze(dim) for block in trace.blocks(tensor))
        )
        for tensor in call.args[0]
    ]
    trace.put(call.out, _side_by_side(trace, operands, dim))


def _side_by_side(trace: Trace, operands: Sequence[Operand], dim: int) -> Blocks:
    ledger = trace.ledger
    joint = {support(block) for operand in operands for block in operand.blocks if dim in support(block)}
    joint = {dims for dims in joint if len(dims) > 1}
    fits = len(joint) == 1 and all(any(support(b) in joint for b in operand.blocks) for operand in operands)
    shared = next(iter(joint)) if fits else frozenset({dim})
    pieces: list[Tensor] = []
    others: list[Operand] = []
    for operand in operands:
        blocks = operand.blocks
        if joint and not fits:
            blocks = tuple(
                part
                for block in blocks
                for part in (restrict(ledger, block, support(block) - {dim}) if support(block) in joint else (block,))
            )
        mine = [block for block in blocks if dim in support(block)]
        shape = [size if index in shared else 1 for index, size in enumerate(operand.shape)]
        pieces.append(mine[0] if mine else torch.full(shape, FIXED))
        rest = tuple(block for block in blocks if dim not in support(block))
        others.append(Operand(tuple(1 if index in shared else size for index, size in enumerate(operand.shape)), rest))
    result = list(unify(ledger, others))
    if any(bool((piece != FIXED).any()) for piece in pieces):
        result += compact(ledger, torch.cat(pieces, dim))
    return disjoint(ledger, result, trace.learned)


def pad(trace: Trace, call: Call) -> None:
    """Constants at the ends: they can go if their number is an attribute of a module."""
    source, out = call.args[0], call.out
    amounts = [int(number) for number in call.args[1]]
    written = trace.written(amounts)
    blocks = trace.blocks(source)
    for index in range(len(amounts) // 2):
        dim = source.ndim - 1 - index
        before, after = amounts[2 * index : 2 * index + 2]
        if min(before, after) < 0:
            blocks = forbid(trace.ledger, blocks, dim, "it is cropped")
        elif before or after:
            blocks = _padded(trace, blocks, dim, written[2 * index : 2 * index + 2])
    trace.put(out, blocks)


def _padded(trace: Trace, blocks: Blocks, dim: int, amounts: Sequence[int | Traced]) -> Blocks:
    result: list[Tensor] = []
    for block in blocks:
        if dim not in support(block):
            result.append(block)
            continue
        ends = []
        for amount in amounts:
            shape = [int(amount) if index == dim else size for index, size in enumerate(block.shape)]
            free = isinstance(amount, Traced) and isinstance(amount.origin, Attribute) and support(block) == {dim}
            end = trace.ledger.fresh(int(amount)).reshape(shape) if free else torch.full(shape, FIXED)
            if free and int(amount) > 1:
                trace.require(amount, (end,), dim)
            ends.append(end)
        result += compact(trace.ledger, torch.cat([ends[0], block, ends[1]], dim))
    return tuple(result)


RULES: dict[str, Rule] = {
    "aten.slice": slicing,
    "aten.select": select,
    "aten.unbind": unbind,
    "aten.split": split,
    "aten.unsafe_split": split,
    "aten.split_with_sizes": split,
    "aten.glu": gate,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.constant_pad_nd": pad,
}
