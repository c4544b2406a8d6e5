from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.target import Target
from tersor.graph import FakeQuantize, lower
from tersor.graph.operators import quantize_dequantize
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    TOWER_DATA,
    Cnn,
    Mlp,
    SharedTower,
    Transformer,
    context_for,
    quantized,
    seeded,
    state_hash,
)


def simulated(build: Callable[[], nn.Module], data: object, **fields: object) -> fx.GraphModule:
    module = seeded(build)
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC if build is Transformer else {})
    candidate = quantized(module, context_for(module, data, target, **fields))
    assert isinstance(candidate.simulation, fx.GraphModule)
    return candidate.simulation


CASES = {
    "cnn": (lambda: simulated(Cnn, CNN_DATA), (CNN_DATA,)),
    "mlp": (lambda: simulated(Mlp, MLP_DATA), (MLP_DATA,)),
    "shared tower": (lambda: simulated(SharedTower, TOWER_DATA), tuple(TOWER_DATA.values())),
    "transformer": (lambda: simulated(Transformer, TEXT_DATA, output="logits"), tuple(TEXT_DATA.values())),
}


@pytest.mark.parametrize("case", CASES)
def test_lowering_changes_nothing_but_the_form(case: str) -> None:
    build, inputs = CASES[case]
    simulation = build()
    before = state_hash(simulation)
    lowered = lower(simulation)
    quantizers = {name: part for name, part in simulation.named_modules() if isinstance(part, FakeQuantize)}
    weights = {
        str(node.args[0].target): quantizers[str(node.target)]
        for node in simulation.graph.nodes
        if node.op == "call_module" and node.args[0].op == "get_attr"
    }
    assert weights
    for path, quantizer in weights.items():
        constant = lowered.constants[path]
        assert constant.codes.dtype == torch.int8
        shape = [-1 if axis == constant.axis else 1 for axis in range(constant.codes.ndim)]
        rounded = quantizer(simulation.get_parameter(path))
        assert torch.equal(constant.codes * constant.scale.reshape(shape), rounded), path
        assert torch.equal(lowered.graph_module.get_parameter(path), rounded), path
    assert not any(isinstance(part, FakeQuantize) for part in lowered.graph_module.modules())
    activations = sum(node.target is quantize_dequantize for node in lowered.graph_module.graph.nodes)
    calls = sum(node.op == "call_module" for node in simulation.graph.nodes)
    assert activations == calls - len(weights)
    with torch.no_grad():
        expected, found = simulation(*inputs), lowered.graph_module(*inputs)
        flips = (found - expected).abs() > 1e-4 * expected.abs().max()
        assert float(flips.double().mean()) < 0.02  # a tie may round to the other code
    assert state_hash(simulation) == before


def test_biases_are_int32_on_the_grid_of_their_products() -> None:
    simulation = simulated(Cnn, CNN_DATA)
    constants = lower(simulation).constants
    biases = {path: constant for path, constant in constants.items() if path.endswith("bias")}
    assert set(biases) == {"stem.bias", "block.0.bias", "head.bias"}
    for path, constant in biases.items():
        assert constant.codes.dtype == torch.int32
        assert torch.allclose(constant.codes * constant.scale, simulation.get_parameter(path), rtol=1e-6, atol=1e-9)
        weight = constants[path.replace("bias", "weight")]
        activation_scale = constant.scale / weight.scale
        assert torch.allclose(activation_scale, activation_scale[0], rtol=1e-5)  # one scale for the whole input


class SharedBias(nn.Module):
    """Two layers, one bias, inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)
        self.two.bias = self.one.bias
        with torch.no_grad():
            self.one.bias.mul_(20)

    def forward(self, features: Tensor) -> Tensor:
        return self.two(40 * functional.relu(self.one(features)))


@pytest.mark.parametrize(("build", "data"), [(SharedBias, MLP_DATA), (SharedTower, TOWER_DATA)])
def test_a_shared_bias_is_rounded_for_each_layer(build: Callable[[], nn.Module], data: object) -> None:
    simulation = simulated(build, data)
    constants = lower(simulation).constants
    layers = [node for node in simulation.graph.nodes if node.target is torch.ops.aten.linear.default]
    paths = [str(node.args[2].target) for node in layers]
    assert len(set(paths)) == len(layers)
    for node, path in zip(layers, paths, strict=True):
        scales = [simulation.get_submodule(str(node.args[position].target)).scale for position in (0, 1)]
        assert torch.equal(constants[path].scale, scales[0] * scales[1])  # type: ignore[operator]


def test_what_was_never_calibrated_stays_float() -> None:
    simulation = simulated(Mlp, MLP_DATA)
    weight = simulation.get_submodule("weight_quantizers.second_weight")
    activation = simulation.get_submodule("activation_quantizers.relu")
    assert isinstance(weight, FakeQuantize)
    assert isinstance(activation, FakeQuantize)
    weight.enabled = activation.enabled = False
    lowered = lower(simulation)
    assert set(lowered.constants) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert torch.equal(lowered.graph_module.get_parameter("second.weight"), simulation.get_parameter("second.weight"))
    with torch.no_grad():
        assert torch.allclose(lowered.graph_module(MLP_DATA), simulation(MLP_DATA), atol=1e-4)
