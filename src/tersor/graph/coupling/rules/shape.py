"""Operators that only move entries: the same operator moves their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.graph.coupling.labels import (
    Blocks,
    along,
    axis,
    compact,
    disjoint,
    forbid,
    restrict,
    support,
    tie,
)
from tersor.graph.coupling.trace import Call, Rule, Trace


def move_labels(trace: Trace, blocks: Blocks, operator: Callable[[Tensor], Tensor]) -> Blocks:
    """Applies an operator that keeps single dimensions apart to every block."""
    moved: list[Tensor] = []
    for block in blocks:
        moved += compact(trace.ledger, operator(block))
    return disjoint(trace.ledger, moved, trace.learned)


def view(trace: Trace, call: Call) -> None:
    """`view`, `reshape`: a dimension that is split carries its labels as a joint block."""
    source, out = call.args[0], call.out
    blocks = move_labels(trace, trace.blocks(source), lambda block: _regroup(block, source.shape, out.shape))
    for dim, number in enumerate(trace.written(out.shape)):
        if out.shape[dim] > 1:
            blocks = trace.require(number, blocks, dim)
    trace.splits += [block for block in blocks if len(support(block)) > 1]
    trace.put(out, blocks)


def _regroup(block: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Reshapes a block as its tensor is reshaped, without blowing up dimensions that it says nothing about."""
    if 0 in old:
        return block.new_zeros([1] * len(new))
    touched = [pair for pair in _factors(old, new) if support(block) & set(pair[0])]
    before = {dim for pair in touched for dim in pair[0]}
    after = {dim for pair in touched for dim in pair[1]}
    full = block.expand([size if dim in before else 1 for dim, size in enumerate(old)])
    return full.reshape([size if dim in after else 1 for dim, size in enumerate(new)])


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Pairs of runs of dimensions with equal product, as short as possible."""
    pairs: list[tuple[range, range]] = []
    start_old = start_new = 0
    product_old = product_new = 1
    i = j = 0
    while i < len(old) or j < len(new):
        if product_old == product_new and (i > start_old or j > start_new) and product_old > 1:
            pairs.append((range(start_old, i), range(start_new, j)))
            start_old, start_new, product_old, product_new = i, j, 1, 1
        elif (product_old <= product_new and i < len(old)) or j >= len(new):
            product_old *= old[i]
            i += 1
        else:
            product_new *= new[j]
            j += 1
    pairs.append((range(start_old, len(old)), range(start_new, len(new))))
    return pairs


def transpose(trace: Trace, call: Call) -> None:
    """`t`, `transpose`, `permute`, `unsqueeze`, `flip`: as on the labels."""
    operator = getattr(torch.ops.aten, call.name.removeprefix("aten."))
    blocks = trace.blocks(call.args[0])
    trace.put(call.out, move_labels(trace, blocks, lambda block: operator(block, *call.args[1:], **call.kwargs)))


def squeeze(trace: Trace, call: Call) -> None:
    """`squeeze`: only dimensions that are one in the tensor vanish."""
    source = call.args[0]
    dims = call.argument(1, "dim", tuple(range(source.ndim)))
    listed = dims if isinstance(dims, tuple | list) else [dims]
    gone = {int(dim) % source.ndim for dim in listed if source.shape[int(dim)] == 1}

    def drop(block: Tensor) -> Tensor:
        return block.reshape([size for dim, size in enumerate(block.shape) if dim not in gone])

    trace.put(call.out, tuple(drop(block) for block in trace.blocks(source)))


def expand(trace: Trace, call: Call) -> None:
    """Copies along a dimension of size one: a new dimension that can be cut like zeros can."""
    source, out = call.args[0], call.out
    extra = out.ndim - source.ndim
    blocks = [block.reshape(*[1] * extra, *block.shape) for block in trace.blocks(source)]
    for dim, number in enumerate(trace.written(out.shape)):
        if dim < extra or source.shape[dim - extra] == 1:
            blocks += trace.sized(number, out.shape[dim], dim, out.ndim)
        elif out.shape[dim] > 1:
            blocks = list(trace.require(number, tuple(blocks), dim))
    trace.put(out, tuple(blocks))


def repeat(trace: Trace, call: Call) -> None:
    """`repeat`: the labels repeat as well."""
    source, times = call.args[0], [int(number) for number in call.args[1]]
    extra = len(times) - source.ndim
    blocks: list[Tensor] = []
    for block in trace.blocks(source):
        shaped = block.reshape(*[1] * extra, *block.shape)
        blocks += compact(
            trace.ledger,
            shaped.repeat([count if dim in support(shaped) else 1 for dim, count in enumerate(times)]),
        )
    for dim, number in enumerate(trace.written(times)):
        size = 1 if dim < extra else source.shape[dim - extra]
        if number > 1 and not any(dim in support(block) for block in blocks):
            for block in trace.sized(number, int(number), dim, call.out.ndim):
                blocks.append(block.repeat_interleave(size, dim))
    trace.put(call.out, tuple(blocks))


def strided(trace: Trace, call: Call) -> None:
    """`as_strided`: the labels laid out like the tensor itself, taken by the same strides."""
    source, out = call.args[0], call.out
    offset = call.argument(3, "storage_offset")
    offset = 0 if offset is None else int(offset) - source.storage_offset()

    def lay(block: Tensor) -> Tensor:
        plan = torch.empty_strided(source.shape, source.stride(), dtype=block.dtype)
        return plan.copy_(block.expand(source.shape)).as_strided(out.shape, out.stride(), offset)

    blocks = trace.blocks(source)
    reach = offset + sum((size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True))
    span = sum((size - 1) * step for size, step in zip(source.shape, source.stride(), strict=True))
    if offset < 0 or reach > span:
        for block in blocks:
            trace.ledger.freeze(block, "it is laid out anew by strides")
        blocks = ()
    blocks = move_labels(trace, blocks, lay)
    for dim, number in enumerate(trace.written(out.shape)):
        if out.shape[dim] > 1:
            blocks = trace.require(number, blocks, dim)
    trace.put(out, blocks)


def diagonal(trace: Trace, call: Call) -> None:
    """The diagonal of two dimensions, which lose the same positions; it becomes the last dimension."""
    source = call.args[0]
    offset = call.argument(1, "offset", 0)
    first, second = (int(call.argument(*given)) % source.ndim for given in ((2, "dim1", 0), (3, "dim2", 1)))
    blocks = trace.blocks(source)
    if offset == 0 and source.shape[first] == source.shape[second]:
        labels = tie(trace.ledger, axis(trace.ledger, blocks, first), axis(trace.ledger, blocks, second))
    else:
        labels = None
        for dim in (first, second):
            blocks = forbid(trace.ledger, blocks, dim, "one of its diagonals is taken")
    kept = [block for block in blocks if not support(block) & {first, second}]
    others = [dim for dim in range(source.ndim) if dim not in (first, second)]
    moved = tuple(block.permute(*others, first, second).squeeze(-1) for block in kept)
    trace.put(call.out, moved + along(labels, call.out.ndim - 1, call.out.ndim))


def shuffle_channels(trace: Trace, call: Call) -> None:
    """`channel_shuffle`: the same positions of every group go, so that as many stay in each."""
    source, groups = call.args[0], int(call.args[1])
    channels = axis(trace.ledger, trace.blocks(source), 1)
    blocks = tuple(block for block in trace.blocks(source) if 1 not in support(block))
    if channels is not None:
        rows = channels.reshape(groups, -1)
        trace.ledger.unite(rows, rows[:1])
        channels = rows.t().reshape(-1)
    trace.put(call.out, (*along(channels, 1, source.ndim), *blocks))


def columns(trace: Trace, call: Call) -> None:
    """`im2col`: every channel becomes a run of columns, one per pixel of the kernel."""
    source, out = call.args[0], call.out
    blocks = _without_pixels(trace, trace.blocks(source), source.ndim)
    batched = source.ndim - 3
    pixels = out.shape[batched] // source.shape[batched]
    parts = (*source.shape[: batched + 1], pixels)

    def move(block: Tensor) -> Tensor:
        return _regroup(block.squeeze(-1).squeeze(-1).unsqueeze(-1), parts, out.shape[: batched + 1]).unsqueeze(-1)

    trace.put(out, move_labels(trace, blocks, move))


def uncolumns(trace: Trace, call: Call) -> None:
    """`col2im`: runs of columns become channels; the runs go whole."""
    source, out = call.args[0], call.out
    dim = source.ndim - 2
    blocks = forbid(trace.ledger, trace.blocks(source), dim + 1, "it is a spatial dimension")
    result: list[Tensor] = []
    for block in blocks:
        if dim in support(block):
            size = out.shape[dim]
            runs = block.reshape(*block.shape[:dim], size, block.shape[dim] // size, 1)
            result += restrict(trace.ledger, runs, support(runs) - {dim + 1})
        else:
            result.append(block.unsqueeze(-1))
    trace.put(out, tuple(result))


def _without_pixels(trace: Trace, blocks: Blocks, ndim: int) -> Blocks:
    for dim in (ndim - 2, ndim - 1):
        blocks = forbid(trace.ledger, blocks, dim, "it is a spatial dimension")
    return blocks


def roll(trace: Trace, call: Call) -> None:
    """A shift by a number of places: nothing can be cut along it."""
    source = call.args[0]
    dims = call.argument(2, "dims", ()) or range(source.ndim)
    blocks = trace.blocks(source)
    for dim in dims if isinstance(dims, tuple | list | range) else [dims]:
        blocks = forbid(trace.ledger, blocks, int(dim) % source.ndim, "it is shifted")
    trace.put(call.out, blocks)


def triangle(trace: Trace, call: Call) -> None:
    """`tril`, `triu`: positions of the last two dimensions are compared; cut alike, they keep their order."""
    source, diagonal = call.args[0], call.argument(1, "diagonal", 0)
    blocks, rows, columns = trace.blocks(source), source.ndim - 2, source.ndim - 1
    if diagonal in (0, 1 if call.name == "aten.triu" else -1) and source.shape[rows] == source.shape[columns]:
        tie(trace.ledger, axis(trace.ledger, blocks, rows), axis(trace.ledger, blocks, columns))
    else:
        for dim in (rows, columns):
            blocks = forbid(trace.ledger, blocks, dim, "its positions are compared")
    trace.put(call.out, blocks)


def shuffle_pixels(trace: Trace, call: Call) -> None:
    """`pixel_shuffle` and its inverse as the views that they are."""
    source, factor = call.args[0], int(call.args[1])
    *lead, channels, height, width = source.shape
    n = len(lead)
    if call.name == "aten.pixel_shuffle":
        parts = [*lead, channels // factor**2, factor, factor, height, width]
        order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    else:
        parts = [*lead, channels, height // factor, factor, width // factor, factor]
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    swapped = [parts[dim] for dim in order]

    def move(block: Tensor) -> Tensor:
        return _regroup(_regroup(block, source.shape, parts).permute(order), swapped, call.out.shape)

    trace.put(call.out, move_labels(trace, trace.blocks(source), move))


RULES: dict[str, Rule] = {
    "aten.view": view,
    "aten._unsafe_view": view,
    "aten.reshape": view,
    "aten._reshape_alias": view,
    "aten.t": transpose,
    "aten.transpose": transpose,
    "aten.permute": transpose,
    "aten.unsqueeze": transpose,
    "aten.flip": transpose,
    "aten.squeeze": squeeze,
    "aten.expand": expand,
    "aten.repeat": repeat,
    "aten.as_strided": strided,
    "aten.im2col": columns,
    "aten.col2im": uncolumns,
    "aten.roll": roll,
    "aten.tril": triangle,
    "aten.triu": triangle,
    "aten.pixel_shuffle": shuffle_pixels,
    "aten.pixel_unshuffle": shuffle_pixels,
    "aten.channel_shuffle": shuffle_channels,
    "aten.native_channel_shuffle": shuffle_channels,
    "aten.diagonal": diagonal,
}
