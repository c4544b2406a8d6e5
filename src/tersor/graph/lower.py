"""Lowers a fake-quantized graph: integer constants for weights and biases, one operator per quantized activation.

Weights become int8 codes, biases int32 codes with the scale of the product they are added to. Written as
ONNX's Q/DQ form by `runtimes.onnx_export`, this is what ONNX Runtime and OpenVINO fuse into integer kernels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import get_tensor, remove_unused_attributes, set_parameter
from tersor.graph.operators import quantize_dequantize
from tersor.graph.rules import COMPUTE

BIAS_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class IntegerConstant:
    """A parameter as the runtime stores it: ``codes * scale`` (every zero point of a constant is 0).

    `scale` is `[K]` along `axis`.
    """

    codes: Tensor
    scale: Tensor
    axis: int


@dataclass(frozen=True)
class Lowered:
    """A graph whose parameters in `constants` are to be stored as integers."""

    graph_module: fx.GraphModule
    constants: dict[str, IntegerConstant]


def lower(simulation: nn.Module) -> Lowered:
    """A lowered copy of a simulation whose `FakeQuantize` modules are calibrated.

    Quantizers that were never calibrated (disabled) are left out: their tensors stay float.
    """
    graph_module = copy.deepcopy(simulation)
    assert isinstance(graph_module, fx.GraphModule)  # noqa: S101 - simulations are captured graphs
    constants: dict[str, IntegerConstant] = {}
    for node in graph_module.graph.nodes:
        rule = COMPUTE.get(node.target)
        if rule is not None and rule.bias is not None and len(node.args) > rule.bias:
            bias, scale = node.args[rule.bias], bias_scale(graph_module, node)
            if scale is not None and isinstance(bias, fx.Node) and bias.op == "get_attr":
                codes = round_bias(get_tensor(graph_module, str(bias.target)), scale).to(torch.int32)
                constants[str(bias.target)] = IntegerConstant(codes, scale.expand(len(codes)).contiguous(), 0)
    for node in list(graph_module.graph.nodes):
        quantizer = quantizer_of(graph_module, node)
        if quantizer is None:
            continue
        source = node.args[0]
        if not quantizer.enabled:
            node.replace_all_uses_with(source)
        elif source.op == "get_attr":
            path, values = str(source.target), get_tensor(graph_module, str(source.target))
            constants[path] = IntegerConstant(quantizer.codes(values), quantizer.scale, quantizer.scheme.axis or 0)
            set_parameter(graph_module, path, quantizer(values))
            node.replace_all_uses_with(source)
        else:
            _replace_activation(graph_module, node, quantizer)
            continue
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    remove_unused_attributes(graph_module)
    graph_module.recompile()
    return Lowered(graph_module, constants)


def quantizer_of(graph_module: fx.GraphModule, node: object) -> FakeQuantize | None:
    """The `FakeQuantize` that this node calls, None if it does not."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, FakeQuantize) else None


def bias_scale(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Scale `[K]` of the int32 bias of a layer: activation scale times weight scale; None if it runs in float."""
    rule = COMPUTE[node.target]
    assert rule.weight is not None  # noqa: S101 - a rule with a bias has a weight
    activation = quantizer_of(graph_module, node.args[rule.activations[0]])
    weight = quantizer_of(graph_module, node.args[rule.weight])
    if activation is None or weight is None or not activation.enabled or not weight.enabled:
        return None
    groups = node.args[6] if rule.channel_axis == 1 and len(node.args) > 6 else 1  # transposed: `[I, O / G, …]`
    assert isinstance(groups, int)  # noqa: S101 - the operator's schema
    return activation.scale * weight.scale.repeat(groups)


def round_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """The int32 codes of a bias, as float64 so that none is lost."""
    return (bias.detach().double() / scale.double()).round().clamp(-BIAS_LIMIT, BIAS_LIMIT)


def _replace_activation(graph_module: fx.GraphModule, node: fx.Node, quantizer: FakeQuantize) -> None:
    name = "q_" + str(node.target).rpartition(".")[2]
    zero_point, scheme, source = quantizer.zero_point.to(quantizer.dtype), quantizer.scheme, node.args[0]
    with graph_module.graph.inserting_before(node):
        if scheme.bits < 8:  # the operator saturates where its integer type ends
            ends = [float((code - quantizer.zero_point) * quantizer.scale) for code in (scheme.qmin, scheme.qmax)]
            source = graph_module.graph.call_function(torch.ops.aten.clamp.default, (source, *ends))
        scale_node = _constant(graph_module, f"{name}_scale", quantizer.scale.reshape(()))
        zero_node = _constant(graph_module, f"{name}_zero", zero_point.reshape(()))
        new = graph_module.graph.call_function(quantize_dequantize, (source, scale_node, zero_node))
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)


def _constant(graph_module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    if not hasattr(graph_module, name):
        graph_module.register_buffer(name, value)
    return graph_module.graph.get_attr(name)
