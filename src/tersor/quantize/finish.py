"""The second half of every quantization on a captured graph: biases on their grid, the plan, the rounded module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, fx, nn

from tersor.core.quantization import QuantPlan, TensorQuant
from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.lower import bias_scale, quantizer_of, round_bias
from tersor.graph.rules import COMPUTE
from tersor.quantize.prepare import Prepared

BIAS_ROOM = 2**30  # half of int32: the other half is for the products that are added


def finish(prepared: Prepared, module: nn.Module, *, pack: bool = False) -> tuple[QuantPlan, nn.Module]:
    """Rounds the biases of the simulation, in place, and tells what was done.

    Args:
        prepared: With all ranges set.
        module: What was captured; stays as it is.
        pack: As in `QuantPlan`.

    Returns:
        The plan, and a copy of the module whose quantized weights have their rounded values.
    """
    _make_room_for_biases(prepared.simulation)
    _round_biases(prepared.simulation)
    return _plan(prepared, pack=pack), _rounded_copy(prepared, module)


def _make_room_for_biases(simulation: fx.GraphModule) -> None:
    """Widens the scales of weights beside which the int32 bias would overflow, leaving room for the products.

    Only weights that hardly matter are concerned: channels that pruning or a BatchNorm emptied, layers whose input
    was always zero. Their scales are so small that the bias, all that these channels give, would saturate.
    """
    for node, bias_node, scale in _biased(simulation):
        weight = quantizer_of(simulation, node.args[COMPUTE[node.target].weight or 0])
        assert weight is not None  # noqa: S101 - else the layer would have no bias scale
        smallest = get_tensor(simulation, str(bias_node.target)).detach().abs() / BIAS_ROOM
        wider = (smallest / scale).clamp(min=1)
        weight.scale = weight.scale * wider.reshape(-1, len(weight.scale)).amax(0)


def _biased(simulation: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """Each integer layer with a constant bias: the layer, the bias, the scale of its int32 codes."""
    for node in list(simulation.graph.nodes):
        rule = COMPUTE.get(node.target)
        if rule is None or rule.bias is None or len(node.args) <= rule.bias:
            continue
        bias_node, scale = node.args[rule.bias], bias_scale(simulation, node)
        if scale is not None and isinstance(bias_node, fx.Node) and bias_node.op == "get_attr":
            yield node, bias_node, scale


def _round_biases(simulation: fx.GraphModule) -> None:
    """Puts every bias on the int32 grid that the kernels add it in, so that the simulation is exact.

    A bias that several layers share becomes one for each: their grids differ as their inputs do.
    """
    for node, bias_node, scale in _biased(simulation):
        path = str(bias_node.target)
        rounded = round_bias(get_tensor(simulation, path), scale) * scale.double()
        if len(bias_node.users) > 1:
            path = f"{path}_{node.name}"
        set_parameter(simulation, path, rounded)
        with simulation.graph.inserting_before(node):
            own = simulation.graph.get_attr(path)
        node.args = tuple(own if argument is bias_node else argument for argument in node.args)
        if not bias_node.users:
            simulation.graph.erase_node(bias_node)
    simulation.recompile()


def _plan(prepared: Prepared, *, pack: bool) -> QuantPlan:
    placement = prepared.placement
    tensors = [
        _entry(name, "weight", prepared.quantizer(path), name.rpartition(".")[0])
        for path, name in placement.weights.items()
    ]
    modules = {node.name: str(node.meta.get("module", "")) for node in prepared.simulation.graph.nodes}
    tensors += [
        _entry(name, "activation", prepared.quantizer(path), modules.get(name, ""))
        for path, name in placement.activations.items()
        if prepared.quantizer(path).enabled
    ]
    return QuantPlan(tensors=tensors, pack=pack)


def _entry(name: str, role: Literal["weight", "activation"], quantizer: FakeQuantize, module: str) -> TensorQuant:
    return TensorQuant(
        name=name,
        role=role,
        scheme=quantizer.scheme,
        scale=quantizer.scale.tolist(),
        zero_point=quantizer.zero_point.tolist(),
        module=module,
    )


def _rounded_copy(prepared: Prepared, module: nn.Module) -> nn.Module:
    """What multiplied a weight before it was quantized is taken out again; channels of factor zero stay.

    Weights that nothing multiplied are shared with the simulation, so that a large model is not held three times.
    """
    copies: dict[int, object] = {}  # as `deepcopy` notes what it has copied
    with torch.no_grad():
        for path, name in prepared.placement.weights.items():
            rounded = prepared.quantizer(path)(get_tensor(prepared.simulation, name).detach())
            weight, unit = get_tensor(module, name), prepared.units.get(name)
            if unit is None:
                set_parameter(prepared.simulation, name, rounded)
            else:
                rounded = torch.where(unit == 0, weight, rounded / torch.where(unit == 0, 1, unit))
            is_parameter = isinstance(weight, nn.Parameter)
            copies[id(weight)] = nn.Parameter(rounded, weight.requires_grad) if is_parameter else rounded
    return copy.deepcopy(module, copies)
