"""The quantized layers of a prepared graph, one by one.

Shapes: `O` outputs, `K` columns of a weight seen as a matrix, `G` groups of a convolution, `N` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.rules import COMPUTE, TRANSPOSED
from tersor.graph.rules.base import ComputeRule
from tersor.graph.stream import varying
from tersor.probe.columns import Window
from tersor.quantize.prepare import Prepared

_STRIDE, _PADDING, _DILATION, _GROUPS = 3, 4, 5, 6  # arguments of a convolution


@dataclass(frozen=True)
class Layer:
    """A layer that computes with a rounded weight.

    Attributes:
        node: It.
        module: Path of its module.
        weight: Path of its weight.
        quantizer: Path of the weight's quantizer.
        source: The node that gives its input, rounded.
    """

    node: fx.Node
    module: str
    weight: str
    quantizer: str
    source: fx.Node

    @property
    def rule(self) -> ComputeRule:
        """Where its operands stand."""
        return COMPUTE[self.node.target]

    @property
    def channel_dim(self) -> int:
        """The dimension of its output that counts the channels."""
        return -1 if self.window is None else 1

    @property
    def window(self) -> Window | None:
        """How it looks at its input; None for a linear layer."""
        if self.node.target is torch.ops.aten.linear.default:
            return None
        weight: Tensor = self.node.args[1].meta["val"]  # type: ignore[union-attr]
        kernel = tuple(weight.shape[2:])
        dilation = _spread(self._argument(_DILATION, 1), len(kernel))
        padding = self._argument(_PADDING, 0)
        if padding == "same":  # the odd one goes behind, as in PyTorch
            total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            sides = [(width // 2, width - width // 2) for width in total]
        else:
            each = _spread(0 if padding == "valid" else padding, len(kernel))
            sides = [(width, width) for width in each]
        flat = [width for side in reversed(sides) for width in side]
        groups = self._argument(_GROUPS, 1)
        assert isinstance(groups, int)  # noqa: S101 - the operator's schema
        return Window(kernel, _spread(self._argument(_STRIDE, 1), len(kernel)), dilation, flat, groups=groups)

    def _argument(self, position: int, default: Any) -> Any:
        return self.node.args[position] if position < len(self.node.args) else default


def _spread(value: Any, count: int) -> list[int]:
    """A number for every dimension; one number, or a list of one, is for all."""
    values = [int(item) for item in (value if isinstance(value, Sequence) else [value])]
    return values * count if len(values) == 1 else values


def layers(prepared: Prepared) -> list[Layer]:
    """Convolutions and linear layers whose weight is rounded and read by them alone, in the order of the graph.

    Without those that no input reaches, and those whose bias is computed.
    """
    placed, found = prepared.placement.weights, []
    for node in varying(prepared.simulation):
        rule = COMPUTE.get(node.target)
        if rule is None or rule.weight is None or not rule.activations or node.target in TRANSPOSED:
            continue
        weight = node.args[rule.weight]
        if isinstance(weight, fx.Node) and weight.op == "call_module" and str(weight.target) in placed:
            stored = weight.args[0]
            assert isinstance(stored, fx.Node)  # noqa: S101 - a quantizer has one operand
            bias = node.args[rule.bias] if rule.bias is not None and rule.bias < len(node.args) else None
            constant = not isinstance(bias, fx.Node) or bias.op == "get_attr"
            if constant and len(weight.users) == 1 and len(stored.users) == 1:
                path, module = str(weight.target), str(node.meta.get("module", ""))
                source = node.args[rule.activations[0]]
                assert isinstance(source, fx.Node)  # noqa: S101 - the operator's schema
                found.append(Layer(node, module, placed[path], path, source))
    return found


def bias_of(prepared: Prepared, layer: Layer) -> Tensor | None:
    """The bias of a layer, `[O]`."""
    node = _bias_node(layer)
    return None if node is None else get_tensor(prepared.simulation, str(node.target)).detach()


def set_bias(prepared: Prepared, layer: Layer, value: Tensor) -> None:
    """Gives a layer another bias, `[O]`; it must have one of its own (see `give_biases`)."""
    node = _bias_node(layer)
    assert node is not None  # noqa: S101 - `give_biases` has seen to it
    set_parameter(prepared.simulation, str(node.target), value)


def give_biases(prepared: Prepared) -> None:
    """Every layer gets a bias that nobody else reads, zero where it had none."""
    graph_module = prepared.simulation
    for layer in layers(prepared):
        node, position = _bias_node(layer), layer.rule.bias
        assert position is not None  # noqa: S101 - `layers` gives layers only
        if node is not None and len(node.users) == 1:
            continue
        weight = get_tensor(graph_module, layer.weight)
        zeros = torch.zeros(weight.shape[layer.rule.channel_axis], dtype=weight.dtype)
        value = zeros if node is None else get_tensor(graph_module, str(node.target)).detach().clone()
        path = f"{layer.weight}_bias_of_{layer.node.name}"
        set_parameter(graph_module, path, value)
        with graph_module.graph.inserting_before(layer.node):
            own = graph_module.graph.get_attr(path)
        layer.node.args = (*layer.node.args[:position], own, *layer.node.args[position + 1 :])
    graph_module.recompile()


def _bias_node(layer: Layer) -> fx.Node | None:
    position = layer.rule.bias
    node = layer.node.args[position] if position is not None and position < len(layer.node.args) else None
    return node if isinstance(node, fx.Node) else None
