"""Spares what is added, pooled or passed on from the few bits that layers get.

`activation_bits` is about the inputs of layers, as in the papers on low widths (Esser et al. 2020,
https://arxiv.org/abs/1902.08153). Where a residual sum reads the same value, placement would round it just as coarsely,
and what every block adds would be rounded away again and again along the network.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.rules import COMPUTE, LOOKUPS, SHARED, TRANSPARENT
from tersor.quantize.prepare import Prepared

SUFFIX = "_residual"
_LAYERS = {operator for operator, rule in COMPUTE.items() if rule.weight is not None} - LOOKUPS
_PASSED_ON = TRANSPARENT | SHARED


def spare_residuals(prepared: Prepared, bits: int) -> Prepared:
    """Gives values that layers read in fewer than `bits` a second quantizer, of `bits`, for all their other readers.

    Args:
        prepared: Its graph is changed in place.
        bits: For the other readers.

    Returns:
        The same graph with the new quantizers in its placement.
    """
    graph_module = prepared.simulation
    activations = dict(prepared.placement.activations)
    for path in prepared.placement.activations:
        scheme = prepared.quantizer(path).scheme
        if scheme.bits >= bits:
            continue
        found = [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target == path]
        others = {node: [user for user in node.users if _is_other(user, path)] for node in found}
        if not any(others.values()):
            continue
        wide = path + SUFFIX
        graph_module.add_submodule(wide, FakeQuantize(scheme.model_copy(update={"bits": bits})))
        placed = [_read_instead(graph_module, node, users, wide) for node, users in others.items() if users]
        activations[wide] = placed[0].name
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return replace(prepared, placement=replace(prepared.placement, activations=activations))


def _is_other(user: fx.Node, path: str) -> bool:
    """Whether a reader is no layer, and does not just hand the value on to layers under the same quantizer."""
    if user.target in _LAYERS:
        return False
    if user.target in _PASSED_ON:
        following = [node for node in user.users if node.op == "call_module" and node.target == path]
        if following:
            return any(_is_other(reader, path) for node in following for reader in node.users)
    return True


def _read_instead(graph_module: fx.GraphModule, quantizer: fx.Node, users: list[fx.Node], path: str) -> fx.Node:
    """Makes `users` read the unrounded value through the quantizer at `path`."""
    (source,) = quantizer.all_input_nodes
    with graph_module.graph.inserting_after(quantizer):
        made = graph_module.graph.call_module(path, (source,))
    made.meta = dict(source.meta)
    for user in users:
        user.replace_input_with(quantizer, made)
    return made
