"""Pointwise operators: residual sums compute in low precision, activation functions are fused."""

from typing import Any

from torch import ops

from tersor.graph.rules.base import ComputeRule

_aten = ops.aten

COMPUTE: dict[Any, ComputeRule] = {
    operator: ComputeRule(activations=(0, 1)) for operator in (_aten.add.Tensor, _aten.add_.Tensor)
}
ACTIVATIONS = frozenset(
    {
        _aten.relu.default,
        _aten.relu_.default,
        _aten.hardtanh.default,
        _aten.hardtanh_.default,
        _aten.relu6.default,
    }
)
SOFTMAX = frozenset({_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default})
