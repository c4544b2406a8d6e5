"""Takes fused attention apart, so that its two products can be quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min
_ATTENTION = _aten.scaled_dot_product_attention.default


def take_attention_apart(graph_module: fx.GraphModule) -> int:
    """Replaces fused attention by ``softmax(s · Q Kᵀ + M) V``, in place; returns how often.

    `Q [B, H, T, E]` takes the scale `s`: of all operands it is the smallest. Grouped queries and dropout stay fused.
    A query that may look at nothing gets the mean of all values where fused attention gives 0: it is padding.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not _ATTENTION or _argument(node, 4, "dropout_p") or node.kwargs.get("enable_gqa"):
            continue
        with graph_module.graph.inserting_before(node):
            whole = _parts(graph_module.graph, node)
        node.replace_all_uses_with(whole)
        graph_module.graph.erase_node(node)
        count += 1
    if count:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return count


def _parts(graph: fx.Graph, node: fx.Node) -> fx.Node:
    module = node.meta.get("module", "")

    def call(operator: Any, *arguments: Any) -> fx.Node:
        made = graph.call_function(operator, arguments)
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in arguments]
        made.meta = {"val": operator(*values), "module": module}
        return made

    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)  # noqa: S101 - the operator's schema
    mask, causal = _argument(node, 3, "attn_mask"), _argument(node, 5, "is_causal")
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else scale
    scores = call(_aten.matmul.default, call(_aten.mul.Tensor, query, scale), call(_aten.transpose.int, key, -2, -1))
    if causal:
        lower = call(_aten.tril.default, call(_aten.ones_like.default, scores))
        scores = call(_aten.masked_fill.Scalar, scores, call(_aten.eq.Scalar, lower, 0), LOWEST)
    if isinstance(mask, fx.Node):
        if mask.meta["val"].dtype is torch.bool:
            scores = call(_aten.masked_fill.Scalar, scores, call(_aten.logical_not.default, mask), LOWEST)
        else:
            scores = call(_aten.add.Tensor, scores, mask)
    return call(_aten.matmul.default, call(_aten.softmax.int, scores, -1), value)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)
