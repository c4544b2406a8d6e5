"""Layers with weights: convolutions, transposed ones, linear layers, embeddings; and products of two activations."""

from typing import Any

from torch import ops

from tersor.graph.rules.base import ComputeRule

_aten = ops.aten

COMPUTE: dict[Any, ComputeRule] = {
    operator: ComputeRule(activations=(0,), weight=1, bias=2)
    for operator in (
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.conv1d.padding,
        _aten.conv2d.padding,
        _aten.conv3d.padding,
        _aten.linear.default,
    )
}
TRANSPOSED = frozenset({_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input})
COMPUTE |= {operator: ComputeRule(activations=(0,), weight=1, bias=2, channel_axis=1) for operator in TRANSPOSED}
PRODUCTS = frozenset({_aten.matmul.default, _aten.bmm.default})
COMPUTE |= {operator: ComputeRule(activations=(0, 1)) for operator in PRODUCTS}
LOOKUPS = frozenset({_aten.embedding.default})
COMPUTE |= {operator: ComputeRule(activations=(), weight=0) for operator in LOOKUPS}
