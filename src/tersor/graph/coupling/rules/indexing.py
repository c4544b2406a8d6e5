"""Indexing by tensors: what is looked up by data stays; the other dimensions move along."""

from __future__ import annotations

from torch import Tensor

from tersor.graph.coupling.labels import Blocks, Operand, along, axis, compact, disjoint, forbid, support, tie, unify
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
    """`index_add`, `index_copy`, `scatter`, `scatter_add`, `scatter_reduce`: one dimension by data."""
    target, dim = call.args[0], int(call.args[1]) % max(call.args[0].ndim, 1)
    operands = []
    for tensor in (target, *(part for part in call.args[2:4] if isinstance(part, Tensor) and part.ndim == target.ndim)):
        blocks = forbid(trace.ledger, trace.blocks(tensor), dim, "its entries are looked up by data")
        shape = tuple(1 if index == dim else size for index, size in enumerate(tensor.shape))
        operands.append(Operand(shape, blocks))
    trace.put(call.out, tuple(b for b in unify(trace.ledger, operands) if dim not in support(b)))


def masked_scatter(trace: Trace, call: Call) -> None:
    """Places that a mask chooses take entries in order: whole rows, where the mask is the same along the last one."""
    target, mask, source = call.args[:3]
    blocks, last = trace.blocks(target), target.ndim - 1
    whole = mask.ndim == target.ndim and source.ndim > 1 and source.shape[-1] == target.shape[-1]
    whole = whole and bool((mask == mask[..., :1]).all())
    for dim in range(last if whole else target.ndim):
        blocks = forbid(trace.ledger, blocks, dim, "its entries are chosen by data")
    others = trace.blocks(source)
    for dim in range(source.ndim - whole):
        others = forbid(trace.ledger, others, dim, "its entries are chosen by data")
    if whole:
        columns = tie(trace.ledger, axis(trace.ledger, blocks, last), axis(trace.ledger, others, source.ndim - 1))
        blocks = along(columns, last, target.ndim)
        unify(trace.ledger, [Operand((*[1] * last, target.shape[-1]), blocks), _columns(trace, mask)])
    trace.put(call.out, blocks)


def _columns(trace: Trace, mask: Tensor) -> Operand:
    """A mask that is the same along its last dimension, of which only the size counts."""
    found = axis(trace.ledger, trace.blocks(mask), mask.ndim - 1)
    if found is None:
        return Operand((1,) * mask.ndim, ())
    return Operand((*[1] * (mask.ndim - 1), mask.shape[-1]), along(found, mask.ndim - 1, mask.ndim))


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
    "aten.scatter_reduce": scatter,
    "aten.index_fill": scatter,
    "aten.masked_scatter": masked_scatter,
    "aten.unfold": windows,
}
