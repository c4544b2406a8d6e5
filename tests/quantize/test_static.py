from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.machine import saturates_int8
from tersor.core.target import Target
from tersor.errors import DataError, NonFiniteError, UnsupportedError
from tersor.graph import FakeQuantize
from tersor.graph.lower import bias_scale
from tersor.quantize import Static, ranges
from tersor.quantize.placement import Placement
from tersor.quantize.prepare import Prepared, set_activation_ranges
from tersor.quantize.styles import Style
from tersor.quantize.widths import weight_scheme
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    TOWER_DATA,
    TWO_DATA,
    Cnn,
    Depthwise,
    Mlp,
    Scaling,
    SharedTower,
    Sized,
    Transformer,
    TwoInputs,
    context_for,
    exported,
    integers,
    normal,
    quantized,
    relative,
    seeded,
    state_hash,
)

CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "cnn": (Cnn, CNN_DATA, {}),
    "linear only": (Mlp, MLP_DATA, {}),
    "conv1d": (lambda: Sized(1), normal(40, 2, 12), {}),
    "conv3d": (lambda: Sized(3), normal(40, 2, 5, 5, 5), {}),
    "depthwise": (Depthwise, normal(40, 4, 8, 8), {}),
    "two inputs": (TwoInputs, TWO_DATA, {}),
    "shared tower": (SharedTower, TOWER_DATA, {}),
    "transformer": (Transformer, TEXT_DATA, {"output": "logits"}),
}


def outputs(candidate: Candidate, context: Any) -> tuple[Tensor, Tensor]:
    """What the simulation and the original answer on the calibrate split."""
    batch = context.task.splits["calibrate"].batch(range(len(context.task.splits["calibrate"])))
    assert candidate.simulation is not None
    with torch.no_grad():
        found = candidate.simulation(*batch.tensors().values())
        return found, select_output(batch.call(context.original), context.task.output)


@pytest.mark.parametrize("case", CASES)
def test_the_simulation_is_near_the_float_model_and_every_weight_on_its_grid(
    case: str, noticed: Callable[[nn.Module], str]
) -> None:
    build, data, fields = CASES[case]
    module = seeded(build)
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC if case == "transformer" else {})
    context = context_for(module, data, target, **fields)
    candidate = Candidate(module)
    before = noticed(module)
    done = Static().apply(candidate, context)
    assert noticed(module) == before
    assert (candidate.plan, candidate.simulation, candidate.history) == (None, None, ())
    assert done.module is not module
    assert done.precision == "int8"
    found, expected = outputs(done, context)
    assert 0 < relative(found, expected) < 0.05

    assert done.plan is not None
    assert isinstance(done.simulation, fx.GraphModule)
    assert done.plan.weights
    for path, quant in done.plan.weights.items():
        quantizer = done.simulation.get_submodule(f"weight_quantizers.{path.replace('.', '_')}")
        assert isinstance(quantizer, FakeQuantize)
        weight = done.simulation.get_parameter(path)
        shape = (-1, *[1] * (weight.ndim - 1))
        codes = quantizer(weight) / quantizer.scale.reshape(shape)
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert quant.scheme == weight_scheme(8, 0, reduced=False)
        assert len(quant.scale) == len(weight)
        largest = codes.round().abs().flatten(1).amax(1)
        assert largest.unique().tolist() == [127]  # symmetric, and every channel uses its whole range
        assert quant.zero_point == [0] * len(weight)


@pytest.mark.parametrize("method", ranges.__all__)
def test_every_range_method_works_and_is_noted(method: str) -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA)
    candidate = quantized(module, context, range_method=method)
    assert relative(*outputs(candidate, context)) < 0.05
    assert f"ranges by {method} on 48 examples" in candidate.history[-1].notes[0]
    assert candidate.history[-1].settings["range_method"] == method


def test_the_record_tells_the_bits_of_every_layer() -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA)
    done = quantized(module, context, weight_bits=4, activation_bits=6, overrides={"block.*": 32})
    (step,) = done.history
    assert step.quantization is not None
    record = step.quantization
    assert [(layer.name, layer.weight_bits, layer.activation_bits) for layer in record.layers] == [
        ("stem", 8, 8), ("block.0", 32, None), ("head", 8, 8),
    ]  # fmt: skip
    assert (record.measure, record.widths, record.layers[0].losses) == (None, [], [])
    plan = done.plan
    assert plan is not None
    widths = {tensor.module: tensor.scheme.bits for tensor in plan.weights.values()}
    assert {layer.name: layer.weight_bits for layer in record.layers if layer.weight_bits < 32} == widths
    for layer in record.layers:
        assert layer.parameters == module.get_submodule(layer.name).get_parameter("weight").numel()
        assert layer.macs > 0
    narrow = quantized(module, context, weight_bits=4, activation_bits=6).history[-1].quantization
    assert narrow is not None
    assert [(layer.weight_bits, layer.activation_bits) for layer in narrow.layers] == [(8, 8), (4, 6), (8, 8)]


def test_tables_and_shared_weights_are_recorded_once() -> None:
    module = seeded(Transformer)
    context = context_for(module, TEXT_DATA, Target(threads=1, dynamic=TEXT_DYNAMIC), output="logits")
    record = quantized(module, context, weight_bits=4).history[-1].quantization
    assert record is not None
    rows = {layer.name: layer for layer in record.layers}
    assert len(rows) == len(record.layers)
    assert sum(layer.parameters for layer in record.layers) <= sum(value.numel() for value in module.parameters())
    tables = [layer for layer in record.layers if isinstance(module.get_submodule(layer.name), nn.Embedding)]
    assert tables
    assert {layer.weight_bits for layer in tables} == {8}


def test_minmax_ranges_are_those_of_the_values() -> None:
    module = seeded(Mlp)
    candidate = quantized(module, context_for(module, MLP_DATA), range_method="minmax")
    assert candidate.plan is not None
    activations = {tensor.name: tensor for tensor in candidate.plan.tensors if tensor.role == "activation"}
    with torch.no_grad():
        inner = functional.relu(module.get_submodule("first")(MLP_DATA))
    assert activations["features"].scale[0] == pytest.approx(float(MLP_DATA.max() - MLP_DATA.min()) / 255, rel=1e-5)
    assert activations["relu"].scale[0] == pytest.approx(float(inner.max()) / 255, rel=1e-5)
    assert activations["relu"].zero_point == [0]


def test_the_same_seed_gives_the_same_bits() -> None:
    module = seeded(Cnn)
    one, two = (quantized(module, context_for(module, CNN_DATA)) for _ in range(2))
    assert one.plan == two.plan
    assert one.simulation is not None
    assert two.simulation is not None
    assert state_hash(one.simulation) == state_hash(two.simulation)


@pytest.mark.parametrize("reduce", [True, False, None])
def test_weights_are_reduced_to_seven_bits_where_kernels_would_overflow(reduce: bool | None) -> None:
    module = seeded(Mlp)
    context = context_for(module, MLP_DATA, Target(threads=1, reduce_range=reduce))
    candidate = quantized(module, context)
    assert candidate.plan is not None
    expected = 7 if (saturates_int8() if reduce is None else reduce) else 8
    assert {quant.scheme.bits for quant in candidate.plan.weights.values()} == {expected}
    assert any("7 bits" in note for note in candidate.history[-1].notes) == (expected == 7)
    assert relative(*outputs(candidate, context)) < 0.05


def test_one_example_is_enough_to_calibrate() -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA[:1])
    candidate = quantized(module, context)
    found, expected = outputs(candidate, context)
    assert relative(found, expected) < 0.05
    assert "on 1 examples" in candidate.history[-1].notes[0]


def test_only_the_wanted_number_of_examples_is_used() -> None:
    module = seeded(Mlp)
    outlier = MLP_DATA.clone()
    outlier[30] = 1000
    scales = []
    for data, settings in ((outlier, {"samples": 20}), (outlier, {}), (MLP_DATA, {"samples": 20, "batch_size": 7})):
        plan = quantized(module, context_for(module, data), range_method="minmax", **settings).plan
        assert plan is not None
        scales.append(next(tensor.scale[0] for tensor in plan.tensors if tensor.name == "features"))
    assert scales[0] == scales[2]
    assert scales[1] > 50 * scales[0]


def test_a_net_without_layers_is_refused_by_name() -> None:
    module = seeded(Scaling)
    with pytest.raises(UnsupportedError, match=r"quantize\.static found no layer .* in Scaling"):
        quantized(module, context_for(module, MLP_DATA))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_than_float32_are_refused(dtype: torch.dtype) -> None:
    module = seeded(Mlp).to(dtype)
    with pytest.raises(UnsupportedError, match=rf"takes float32 models, Mlp has \['{dtype}'\]; call model\.float"):
        quantized(module, context_for(module, MLP_DATA.to(dtype)))


def test_calibration_needs_its_split() -> None:
    module = seeded(Mlp)
    with pytest.raises(DataError, match=r"quantize\.static needs a 'calibrate' split"):
        quantized(module, context_for(module, None, report=MLP_DATA))


class Logarithm(nn.Module):
    """NaN for negative values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.last = nn.Linear(12, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(torch.log(self.first(features)))


def test_bad_calibration_data_is_named_by_batch() -> None:
    data = MLP_DATA.clone()
    data[23, 4] = float("nan")
    module = seeded(Mlp)
    with pytest.raises(NonFiniteError, match=r"calibration batch 2 .* 1 of 120 values"):
        quantized(module, context_for(module, data), batch_size=10)


def test_values_that_become_bad_are_named_by_place() -> None:
    module = seeded(Logarithm)
    with pytest.raises(NonFiniteError, match="calibration batch 0 produced NaN or Inf at 'log'"):
        quantized(module, context_for(module, MLP_DATA))


def test_a_range_too_wide_for_float32_is_refused() -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("first.weight").mul_(1e-3)
    data = MLP_DATA.clone()
    data[0, 0], data[1, 1] = 3e38, -3e38
    with pytest.raises(DataError, match=r"range of 'features' .* too wide"):
        quantized(module, context_for(module, data))


class Dead(nn.Module):
    """A layer whose activation is always zero, and a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)
        with torch.no_grad():
            self.first.bias.fill_(-1e3)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(functional.relu(self.first(features)))


def test_constant_activations_and_unused_layers_do_no_harm() -> None:
    module = seeded(Dead)
    context = context_for(module, MLP_DATA)
    candidate = quantized(module, context)
    found, expected = outputs(candidate, context)
    assert torch.allclose(found, expected, atol=1e-2)
    assert candidate.plan is not None
    assert set(candidate.plan.weights) == {"first.weight", "last.weight"}
    constant = context_for(module, torch.full((9, 12), 0.5))
    found, expected = outputs(quantized(module, constant), constant)
    assert torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
def test_empty_channels_do_no_harm_and_keep_their_bias(size: float) -> None:
    module = seeded(Cnn)
    with torch.no_grad():
        module.get_parameter("stem.weight")[2] *= size
        module.get_parameter("stem_norm.weight")[3] *= size
        module.get_parameter("head.weight")[1] *= size
        module.get_parameter("head.bias")[1] = 5.0
    context = context_for(module, CNN_DATA)
    candidate = quantized(module, context)
    found, expected = outputs(candidate, context)
    assert relative(found, expected) < 0.05
    assert torch.allclose(found[:, 1], torch.tensor(5.0), atol=1e-5)
    assert candidate.plan is not None
    assert all(0 < scale < float("inf") for tensor in candidate.plan.tensors for scale in tensor.scale)
    fresh = candidate.for_weights().module
    assert all(bool(torch.isfinite(parameter).all()) for parameter in fresh.parameters())


class Choosing(nn.Module):
    """Decides by the data which tap is reached; a captured graph cannot, so this stands in for one that could."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = FakeQuantize(weight_scheme(8, None, reduced=False))
        self.other = FakeQuantize(weight_scheme(8, None, reduced=False))

    def forward(self, features: Tensor) -> Tensor:
        return self.reached(features) if bool((features < 1e6).all()) else self.other(features)


@pytest.mark.parametrize("method", ranges.__all__)
def test_what_no_example_reaches_stays_float_and_is_told(method: str) -> None:
    simulation: Any = Choosing()
    placement = Placement({"reached": "a", "other": "b"}, {}, ())
    batches = [context_for(Mlp(), MLP_DATA).task.example(9)]
    assert set_activation_ranges(Prepared(simulation, placement, {}, {}, Style()), method, lambda: batches) == ["b"]
    assert simulation.reached.enabled
    assert not simulation.other.enabled
    huge = torch.full((1, 12), 1e7)
    assert simulation(huge) is huge


def test_quantizing_again_after_a_change_starts_afresh() -> None:
    module = seeded(Mlp)
    context = context_for(module, MLP_DATA)
    first = Static().apply(Candidate(frozen_copy(module)), context)
    second = Static().apply(replace(first.for_weights()), context)
    assert second.plan is not None
    assert first.plan is not None
    for path, quant in second.plan.weights.items():
        assert quant.scale == pytest.approx(first.plan.weights[path].scale, rel=1e-5)  # the grid is kept
    assert [record.name for record in second.history] == ["quantize.static", "quantize.static"]


class Uneven(nn.Module):
    """Channels of very different size before a layer and behind it, as BatchNorm and LayerNorm leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        sizes = torch.logspace(-0.6, 0.6, 16)
        with torch.no_grad():
            self.first.weight.mul_(sizes[:, None])
            self.first.bias.mul_(sizes)
            self.second.weight.div_(sizes)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(functional.relu(self.second(functional.relu(self.first(features)))))


CORRELATED = CNN_DATA + 2 * normal(48, 1, 1, 1, seed=9)
RECOVERIES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "equalize": (Uneven, MLP_DATA, {"equalize": True}),
    "smooth": (Uneven, MLP_DATA, {"smooth": 0.5}),
    "mean": (Cnn, CORRELATED, {"correction": "mean"}),
    "mean and variance": (Cnn, CORRELATED, {"correction": "mean_and_variance"}),
    "gptq": (Cnn, CORRELATED, {"rounding": "gptq"}),
    "obq": (Cnn, CORRELATED, {"rounding": "obq"}),
    "adaround": (Cnn, CORRELATED, {"rounding": "adaround", "steps": 100}),
    "blocks": (Cnn, CORRELATED, {"rounding": "blocks", "steps": 100}),
    "gptq and mean": (Cnn, CORRELATED, {"rounding": "gptq", "correction": "mean"}),
    "all of it": (
        Uneven,
        MLP_DATA,
        {"equalize": True, "smooth": 0.5, "rounding": "blocks", "steps": 50, "correction": "mean"},
    ),
}


def coarse(build: Callable[[], nn.Module], data: Tensor, **settings: Any) -> tuple[Candidate, Any]:
    """Weights in 3 bits, activations in 4."""
    module = seeded(build)
    context = context_for(module, data)
    fields = {"weight_bits": 3, "activation_bits": 4, "edge_bits": 4, "batch_size": 16, **settings}
    return quantized(module, context, **fields), context


@cache
def recovered(case: str) -> Candidate:
    build, data, settings = RECOVERIES[case]
    return coarse(build, data, **settings)[0]


@pytest.mark.parametrize("case", RECOVERIES)
def test_every_recovery_brings_the_model_nearer_to_float(case: str, noticed: Callable[[nn.Module], str]) -> None:
    build, data, settings = RECOVERIES[case]
    plain, context = coarse(build, data)
    before = noticed(context.original)
    done, again = recovered(case), coarse(build, data, **settings)[0]
    assert relative(*outputs(done, context)) < relative(*outputs(plain, context))
    assert noticed(context.original) == before
    assert done.plan == again.plan
    assert state_hash(done.module) == state_hash(again.module)
    assert done.simulation is not None
    assert again.simulation is not None
    assert state_hash(done.simulation) == state_hash(again.simulation)
    assert all(done.history[-1].settings[name] == value for name, value in settings.items())


@pytest.mark.parametrize("case", RECOVERIES)
def test_weights_and_biases_are_whole_numbers_of_their_steps(case: str) -> None:
    done = recovered(case)
    assert done.plan is not None
    assert isinstance(done.simulation, fx.GraphModule)
    for path, quant in done.plan.weights.items():
        quantizer = done.simulation.get_submodule(f"weight_quantizers.{path.replace('.', '_')}")
        assert isinstance(quantizer, FakeQuantize)
        weight, scale = done.simulation.get_parameter(path), torch.tensor(quant.scale)
        codes = quantizer(weight) / scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert quant.scheme.qmin <= int(codes.round().min()) <= int(codes.round().max()) <= quant.scheme.qmax
    for node in done.simulation.graph.nodes:
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            step = bias_scale(done.simulation, node)
            assert step is not None
            codes = done.simulation.get_parameter(str(node.args[2].target)).double() / step.double()
            assert torch.allclose(codes, codes.round(), atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_four_bits_work_for_every_model(case: str) -> None:
    build, data, fields = CASES[case]
    module = seeded(build)
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC if case == "transformer" else {})
    context = context_for(module, data, target, **fields)
    done = quantized(module, context, weight_bits=4, activation_bits=4, edge_bits=4)
    assert 0.001 < relative(*outputs(done, context)) < 0.6
    assert done.plan is not None
    assert {quant.scheme.bits for path, quant in done.plan.weights.items() if "embedding" not in path} == {4}
    note = done.history[-1].notes[0]
    assert "weights in int4" in note
    assert "activations in int4" in note


def test_more_bits_are_nearer() -> None:
    errors = []
    for bits in range(3, 9):
        done, context = coarse(Cnn, CORRELATED, weight_bits=bits, activation_bits=8, edge_bits=bits)
        errors.append(relative(*outputs(done, context)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "obq", "adaround", "blocks"])
def test_pruned_weights_stay_pruned(rounding: str) -> None:
    module = seeded(Cnn)
    weights = {name: module.get_parameter(name) for name in ("stem.weight", "block.0.weight", "head.weight")}
    masks = {name: weight.abs() > weight.abs().median() for name, weight in weights.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    context = context_for(module, CORRELATED)
    step = Static(weight_bits=3, edge_bits=3, rounding=rounding, steps=30)
    done = step.apply(Candidate(frozen_copy(module), masks=masks), context)
    for name, mask in masks.items():
        assert not bool(done.module.get_parameter(name)[~mask].any())
        assert bool(done.module.get_parameter(name)[mask].any())


def test_distilled_data_stand_in_for_a_split() -> None:
    module = seeded(Cnn)
    context = context_for(module, None, report=CNN_DATA)
    done = quantized(module, context, examples="distilled", samples=20, batch_size=10, range_method="minmax")
    assert Static(examples="distilled").needs == frozenset()
    assert "on 20 distilled examples" in done.history[-1].notes[0]
    assert done.simulation is not None
    with torch.no_grad():
        assert relative(done.simulation(CNN_DATA), module(CNN_DATA)) < 0.3


class Generator(nn.Module):
    """Tokens in, images out: an embedding, attention, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        query, key, value = (layer(hidden) for layer in (self.query, self.key, self.value))
        seen = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.last(functional.relu(self.up(seen.reshape(-1, 8, 2, 3))))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("settings", [{}, {"rounding": "gptq", "correction": "mean"}], ids=["plain", "recovered"])
def test_the_session_answers_like_the_simulation(runtime: str, settings: dict[str, Any], tmp_path: Path) -> None:
    module = seeded(Generator)
    context = context_for(module, integers(24, 48, 6), Target(runtime, threads=1, reduce_range=True))
    done = quantized(module, context, **settings)
    assert done.plan is not None
    assert set(done.plan.weights) >= {f"{name}.weight" for name in ("table", "query", "key", "value", "last")}
    assert ("up.weight" in done.plan.weights) == (runtime == "openvino")
    tokens = integers(24, 48, 6)
    found = torch.as_tensor(exported(done, context, tmp_path)()(tokens))
    simulated, expected = outputs(done, context)
    assert relative(simulated, expected) < 0.05
    assert relative(found, simulated) < 0.2 * relative(simulated, expected)
