"""Convolutions and linear layers: an activation, a weight and perhaps a bias."""

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
