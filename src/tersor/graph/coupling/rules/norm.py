"""Normalisations: the scale and shift go with the channels; statistics then run over what is left.

Shapes: `C` channels, `G` groups.
"""

from __future__ import annotations

from collections.abc import Iterable

from tersor.graph.coupling.labels import Blocks, Operand, along, axis, forbid, support, tie, unify
from tersor.graph.coupling.trace import Call, Rule, Trace


def batch_norm(trace: Trace, call: Call) -> None:
    """Every channel by itself: its scale, shift and statistics go with it; new statistics run over what stays."""
    image = call.args[0]
    out = call.out[0] if isinstance(call.out, tuple | list) else call.out
    channels = axis(trace.ledger, trace.blocks(image), 1)
    others = tuple(block for block in trace.blocks(image) if 1 not in support(block))
    for tensor in call.args[1:5]:
        if tensor is not None and tensor.numel() > 1:
            tie(trace.ledger, channels, axis(trace.ledger, trace.blocks(tensor), 0))
    trace.put(out, (*along(channels, 1, image.ndim), *others))


def _fixed(trace: Trace, blocks: Blocks, dims: Iterable[int]) -> Blocks:
    """What a statistic runs over stays."""
    for dim in dims:
        blocks = forbid(trace.ledger, blocks, dim, "a normalisation runs over it")
    return blocks


def layer_norm(trace: Trace, call: Call) -> None:
    """`native_layer_norm`, `_fused_rms_norm`: over the last dimensions, with the same scale at every other place."""
    values, sizes = call.args[0], call.args[1]
    out = call.out[0] if isinstance(call.out, tuple | list) else call.out
    lead = values.ndim - len(sizes)
    operands = [trace.operand(values)]
    for tensor in call.args[2:4]:
        if hasattr(tensor, "shape"):
            shaped = tuple(block.reshape(*[1] * lead, *block.shape) for block in trace.blocks(tensor))
            operands.append(Operand((*[1] * lead, *tensor.shape), shaped))
    blocks = unify(trace.ledger, operands, apart=range(lead, values.ndim))
    for offset, number in enumerate(trace.written(sizes)):
        blocks = trace.require(number, blocks, lead + offset)
    trace.put(out, blocks)


def group_norm(trace: Trace, call: Call) -> None:
    """Channels of a group share a statistic: the same positions of every group go, or whole groups."""
    image, weight, bias, groups = call.args[0], call.args[1], call.args[2], call.args[6]
    ledger = trace.ledger
    channels = axis(ledger, trace.blocks(image), 1)
    for tensor in (weight, bias):
        if tensor is not None:
            tie(ledger, channels, axis(ledger, trace.blocks(tensor), 0))
    if channels is not None and 1 < groups < len(channels):
        rows = trace.require(trace.written([groups])[0], (channels.reshape(groups, -1),), 0)
        trace.splits += [block for block in rows if len(support(block)) > 1]
    elif channels is not None and groups > 1:
        trace.require(trace.written([groups])[0], (channels,), 0)
    others = tuple(block for block in trace.blocks(image) if 1 not in support(block))
    others = _fixed(trace, others, range(2, image.ndim))
    trace.put(call.out[0], (*along(channels, 1, image.ndim), *others))


def weight_norm(trace: Trace, call: Call) -> None:
    """`_weight_norm_interface`: a direction and lengths along one dimension; the norm runs over what stays."""
    direction, lengths = call.args[0], call.args[1]
    trace.put(call.out[0], unify(trace.ledger, [trace.operand(direction), trace.operand(lengths)]))


def softmax(trace: Trace, call: Call) -> None:
    """Entries share a sum of one: none may go."""
    dim = int(call.args[1]) % max(call.args[0].ndim, 1)
    trace.put(call.out, forbid(trace.ledger, trace.blocks(call.args[0]), dim, "a softmax runs over it"))


RULES: dict[str, Rule] = {
    "aten.native_batch_norm": batch_norm,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten._batch_norm_no_update": batch_norm,
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": layer_norm,
    "aten.native_group_norm": group_norm,
    "aten._weight_norm_interface": weight_norm,
    "aten._softmax": softmax,
    "aten._log_softmax": softmax,
    "aten._safe_softmax": softmax,
}
