"""Indexing by tensors: what is looked up by data stays; the other dimensions move along."""

from __future__ import annotations

from torch import Tensor

from tersor.graph.coupling.labels import Blocks, Operand, compact, disjoint, forbid, support, unify
from tersor.graph.coupling.rules.pointwise import broadcast
from tersor.graph.coupling.trace import Call, Rule, Trace


def _looked_up(trace: Trace, source: Tensor, indices: list[Tensor | None]) -> Blocks:
    """Blocks of `source[indices]`."""
    blocks, dim = trace.blocks(source), 0
    places: list[Tensor | slice] = []
    for index in indices:
        if index is None:
            places.append(slice(None))
            dim += 1
            continue
        found = list(index.nonzero().unbind(1)) if _mask(index) else [index]
        for place in found:
            blocks = forbid(trace.ledger, blocks, dim, "its entries are looked up by data")
            places.append(place * 0)  # the block has one entry there
            dim += 1
    moved: list[Tensor] = []
    for block in blocks:
        moved += compact(trace.ledger, block[tuple(places)])
    return disjoint(trace.ledger, moved, trace.learned)


def _mask(index: Tensor) -> bool:
    return str(index.dtype) in ("torch.bool", "torch.uint8")


def index(trace: Trace, call: Call) -> None:
    """`x[i, :, j]`."""
    trace.put(call.out, _looked_up(trace, call.args[0], list(call.args[1])))


def index_put(trace: Trace, call: Call) -> None:
    """`x[i] = values`."""
    target, indices, values = call.args[0], list(call.args[1]), call.args[2]
    blocks = _looked_up(trace, target, indices)
    shape = target[tuple(slice(None) if i is None else i for i in indices)].shape
    if values.ndim <= len(shape):
        unify(trace.ledger, [Operand(tuple(shape), blocks), broadcast(trace.operand(values), len(shape))])
    trace.put(call.out, trace.blocks(target))


def gather(trace: Trace, call: Call) -> None:
    """`gather`, `index_select`, `take_along_dim`: one dimension by data."""
    source, dim, places = call.args[0], int(call.args[1]), call.args[2]
    dim %= max(source.ndim, 1)
    blocks = forbid(trace.ledger, trace.blocks(source), dim, "its entries are looked up by data")
    if call.name == "aten.gather":
        shape = tuple(1 if index == dim else size for index, size in enumerate(source.shape))
        blocks = unify(trace.ledger, [Operand(shape, blocks), trace.operand(places)])
    trace.put(call.out, blocks)


def scatter(trace: Trace, call: Call) -> None:
    """`index_add`, `index_copy`, `scatter`, `scatter_add`: one dimension by data."""
    target, dim = call.args[0], int(call.args[1]) % max(call.args[0].ndim, 1)
    operands = []
    for tensor in (target, *(part for part in call.args[3:4] if isinstance(part, Tensor) and part.ndim == target.ndim)):
        blocks = forbid(trace.ledger, trace.blocks(tensor), dim, "its entries are looked up by data")
        shape = tuple(1 if index == dim else size for index, size in enumerate(tensor.shape))
        operands.append(Operand(shape, blocks))
    trace.put(call.out, tuple(b for b in unify(trace.ledger, operands) if dim not in support(b)))


def windows(trace: Trace, call: Call) -> None:
    """`unfold`: sliding windows along one dimension."""
    source, dim = call.args[0], int(call.args[1]) % call.args[0].ndim
    blocks = forbid(trace.ledger, trace.blocks(source), dim, "windows slide along it")
    trace.put(call.out, tuple(block.unsqueeze(-1) for block in blocks))


RULES: dict[str, Rule] = {
    "aten.index": index,
    "aten.index_put": index_put,
    "aten._index_put_impl": index_put,
    "aten.gather": gather,
    "aten.index_select": gather,
    "aten.index_add": scatter,
    "aten.index_copy": scatter,
    "aten.scatter": scatter,
    "aten.scatter_add": scatter,
    "aten.unfold": windows,
}
