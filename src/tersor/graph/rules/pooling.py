"""Pooling: a maximum keeps codes as they are, an average computes with them."""

from typing import Any

from torch import ops

from tersor.graph.rules.base import ComputeRule

_aten = ops.aten

COMPUTE: dict[Any, ComputeRule] = {
    operator: ComputeRule(activations=(0,))
    for operator in (
        _aten.mean.dim,
        _aten.avg_pool1d.default,
        _aten.avg_pool2d.default,
        _aten.adaptive_avg_pool1d.default,
        _aten.adaptive_avg_pool2d.default,
    )
}
TRANSPARENT = frozenset({_aten.max_pool1d.default, _aten.max_pool2d.default})
