"""Contractions: what is summed over must go on both sides.

Shapes: `C` input channels, `O` outputs, `G` groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tersor.graph.coupling.integers import Traced
from tersor.graph.coupling.labels import Blocks, Ledger, Operand, along, axis, forbid, support, tie, unify
from tersor.graph.coupling.trace import Call, Grouped, Rule, Trace


def _spread(operand: Operand, dims: Sequence[int], ndim: int) -> Operand:
    """Puts a tensor's dimensions at the places `dims` (ascending) of an index space."""
    shape = [1] * ndim
    for place, size in zip(dims, operand.shape, strict=True):
        shape[place] = size
    blocks = []
    for block in operand.blocks:
        sizes = [1] * ndim
        for place, size in zip(dims, block.shape, strict=True):
            sizes[place] = size
        blocks.append(block.reshape(sizes))
    return Operand(tuple(shape), tuple(blocks))


def _product(trace: Trace, left: Tensor, right: Tensor) -> Blocks:
    """`[…, M, K] x […, K, N]`: `K` goes on both sides, `M` and `N` stay as they are."""
    batch = left.ndim - 2
    lead = list(range(batch))
    space = batch + 3
    blocks = unify(
        trace.ledger,
        [
            _spread(trace.operand(left), [*lead, batch, batch + 1], space),
            _spread(trace.operand(right), [*lead, batch + 1, batch + 2], space),
        ],
        apart={batch + 1},
    )
    return tuple(block.squeeze(batch + 1) for block in blocks if support(block) != {batch + 1})


def multiply(trace: Trace, call: Call) -> None:
    """`mm`, `bmm`."""
    trace.put(call.out, _product(trace, call.args[0], call.args[1]))


def add_multiply(trace: Trace, call: Call) -> None:
    """`addmm`, `baddbmm`: a bias or sum comes on top."""
    extra = trace.operand(call.args[0])
    ndim = call.out.ndim
    product = Operand(tuple(call.out.shape), _product(trace, call.args[1], call.args[2]))
    padded = _spread(extra, list(range(ndim - len(extra.shape), ndim)), ndim)
    trace.put(call.out, unify(trace.ledger, [product, padded]))


def matrix_vector(trace: Trace, call: Call) -> None:
    """`mv`, `dot`: the sum runs over the vector."""
    matrix, vector = call.args[0], call.args[1]
    tie(
        trace.ledger,
        axis(trace.ledger, trace.blocks(matrix), matrix.ndim - 1),
        axis(trace.ledger, trace.blocks(vector), 0),
    )
    trace.put(call.out, along(axis(trace.ledger, trace.blocks(matrix), 0), 0, 1) if matrix.ndim == 2 else ())


def grouped_multiply(trace: Trace, call: Call) -> None:
    """`_grouped_mm`, experts in one tensor: rows `[T, K]` by `[E, K, N]`; experts cannot go."""
    left, right = call.args[0], call.args[1]
    ledger = trace.ledger
    weight = trace.blocks(right)
    if left.ndim != 2 or right.ndim != 3:
        for block in (*trace.blocks(left), *weight):
            ledger.freeze(block, "this form of grouped product is not known")
        return
    weight = forbid(ledger, weight, 0, "experts are chosen by data")
    for tensor, blocks in ((left, trace.blocks(left)), (right, weight)):
        for dim in range(tensor.ndim):
            if tensor.stride(dim) == 1:
                _in_runs(ledger, axis(ledger, blocks, dim), 16 // tensor.element_size())
    tie(ledger, axis(ledger, trace.blocks(left), 1), axis(ledger, weight, 1))
    trace.put(call.out, along(axis(ledger, weight, 2), 1, 2))


def _in_runs(ledger: Ledger, labels: Tensor | None, least: int) -> None:
    """Rows must begin at multiples of 16 bytes, so runs of entries go; of 8, if possible: that fits 16-bit numbers."""
    if labels is not None:
        runs = labels.reshape(-1, 8 if len(labels) % 8 == 0 else least)
        ledger.unite(runs, runs[:, :1])


def convolution(trace: Trace, call: Call) -> None:
    """Convolutions of any dimension, transposed and grouped ones too."""
    image, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.argument(6, "transposed"), call.argument(8, "groups")
    ledger = trace.ledger
    kernel = trace.blocks(weight)
    for dim in range(2, weight.ndim):
        kernel = forbid(ledger, kernel, dim, "")
    inputs = axis(ledger, trace.blocks(image), 1)
    batch = axis(ledger, tuple(b for b in trace.blocks(image) if support(b) == {0}), 0)
    for block in trace.blocks(image):
        if support(block) - {0, 1} and not support(block) & {1}:
            ledger.freeze(block, "a convolution runs along it")
    first, second = axis(ledger, kernel, 0), axis(ledger, kernel, 1)
    if groups == 1:
        inner, outer = (first, second) if transposed else (second, first)
        if image.shape[1] > 1:
            tie(ledger, inputs, inner)
    else:
        outer = _grouped(trace, call, inputs, first, second)
    if bias is not None and call.out.shape[1] > 1:
        tie(ledger, outer, axis(ledger, trace.blocks(bias), 0))
    trace.put(call.out, along(batch, 0, call.out.ndim) + along(outer, 1, call.out.ndim))


def _grouped(
    trace: Trace, call: Call, inputs: Tensor | None, first: Tensor | None, second: Tensor | None
) -> Tensor | None:
    """Labels of the outputs, `[O]`. A weight is `[O, C / G, …]`, transposed `[C, O / G, …]`."""
    ledger, groups = trace.ledger, int(call.argument(8, "groups"))
    transposed = bool(call.argument(6, "transposed"))
    channels, outputs = call.args[0].shape[1], call.out.shape[1]
    if inputs is None or first is None:
        for labels in (inputs, first, second):
            if labels is not None:
                ledger.freeze(labels, "it meets a dimension that is fixed")
        return None
    per_group = channels // groups
    given = trace.function[1] if trace.function is not None else []
    number = next((value for value in reversed(given) if value == groups), Traced(groups))  # after strides and padding
    if min(per_group, outputs // groups) > 1 and not transposed:
        trace.grouped.append(Grouped(inputs.reshape(groups, per_group), first.reshape(groups, -1), second, number))
        return first
    if transposed:
        ledger.unite(inputs, first)
    if min(per_group, outputs // groups) > 1 and min(channels, outputs) >= groups**2:
        position = inputs.reshape(groups, per_group)
        ledger.unite(position, position[:1])
        return None if second is None else second.repeat(groups)
    whole = inputs.reshape(groups, per_group)
    ledger.unite(whole, whole[:, :1])
    if second is not None:
        ledger.freeze(second, "whole groups of a grouped convolution go")
    if not transposed:
        rows = first.reshape(groups, -1)
        ledger.unite(rows, whole[:, :1])
    trace.require(number, (whole[:, 0],), 0)
    return whole[:, :1].expand(groups, outputs // groups).reshape(-1)


def trilinear(trace: Trace, call: Call) -> None:
    """`_trilinear`, of which `nn.Bilinear` is made: a product of three, summed over some dimensions."""
    operands = []
    for tensor, dims in zip(call.args[:3], call.args[3:6], strict=True):
        shape, blocks = list(tensor.shape), list(trace.blocks(tensor))
        for dim in dims:
            shape.insert(dim, 1)
            blocks = [block.unsqueeze(dim) for block in blocks]
        operands.append(Operand(tuple(shape), tuple(blocks)))
    summed = {int(dim) for dim in call.args[6]}
    kept = [block for block in unify(trace.ledger, operands, apart=summed) if not support(block) & summed]
    trace.put(
        call.out, tuple(block.reshape([n for dim, n in enumerate(block.shape) if dim not in summed]) for block in kept)
    )


def distances(trace: Trace, call: Call) -> None:
    """`cdist`: `[…, P, M]` and `[…, R, M]`, every pair; the distance runs over `M` on both sides."""
    left, right = call.args[0], call.args[1]
    batch, space = call.out.ndim - 2, call.out.ndim + 1
    operands = []
    for tensor, place in ((left, batch), (right, batch + 1)):
        lead = list(range(batch - tensor.ndim + 2, batch))
        operands.append(_spread(trace.operand(tensor), [*lead, place, batch + 2], space))
    blocks = unify(trace.ledger, operands, apart={batch + 2})
    trace.put(call.out, tuple(block.squeeze(batch + 2) for block in blocks if support(block) != {batch + 2}))


def embedding(trace: Trace, call: Call) -> None:
    """A table `[V, C]` by indices: rows are chosen by data, columns can go."""
    weight, indices = call.args[0], call.args[1]
    columns = axis(trace.ledger, forbid(trace.ledger, trace.blocks(weight), 0, ""), 1)
    lead = tuple(block.unsqueeze(-1) for block in trace.blocks(indices))
    trace.put(call.out, lead + along(columns, call.out.ndim - 1, call.out.ndim))


def embedding_bag(trace: Trace, call: Call) -> None:
    """Sums, means or maxima of rows of a table `[V, C]` that data chooses; columns can go."""
    columns = axis(trace.ledger, forbid(trace.ledger, trace.blocks(call.args[0]), 0, ""), 1)
    trace.put(call.out[0], along(columns, 1, 2))


RULES: dict[str, Rule] = {
    "aten.mm": multiply,
    "aten.bmm": multiply,
    "aten.addmm": add_multiply,
    "aten.baddbmm": add_multiply,
    "aten.mv": matrix_vector,
    "aten.dot": matrix_vector,
    "aten.vdot": matrix_vector,
    "aten._trilinear": trilinear,
    "aten._cdist_forward": distances,
    "aten._euclidean_dist": distances,
    "aten._grouped_mm": grouped_multiply,
    "aten.convolution": convolution,
    "aten.embedding": embedding,
    "aten._embedding_bag": embedding_bag,
    "aten._embedding_bag_forward_only": embedding_bag,
}
