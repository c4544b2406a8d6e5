from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

from low_bit_zoo import MODELS, RUNTIMES, TOKENS, Made, made, optimised_operators
from tersor.core.candidate import Candidate
from tersor.core.quantization import QuantScheme
from tersor.core.target import Target
from tersor.quantize import Static, WeightOnly
from tersor.runtimes.onnx_storage import in_blocks
from tersor.runtimes.parity import check_parity
from tersor.runtimes.stored_weights import StoredWeight, expanded
from zoo import CNN_DATA, Cnn, context_for, exported, normal, quantized, relative, seeded

SLOW = {"lstm both ways", "rnn", "attention", "mlp"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    @cache
    def build(model: str, runtime: str, bits: int | None = 4) -> Made:
        step = None if bits is None else WeightOnly(bits=bits)  # type: ignore[arg-type]
        return made(model, runtime, step, tmp_path_factory.mktemp("artifact"))

    return build


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MODELS])
def test_it_answers_like_the_rounded_module_and_is_smaller(model: str, runtime: str, make: Callable[..., Made]) -> None:
    found = make(model, runtime)
    assert check_parity(found.loaded, found.candidate, found.context.task.example) < 1e-5  # nothing else is rounded
    assert found.bytes < make(model, runtime, None).bytes


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", ["transformer", "lstm", "cnn", "conv1d of transformers"])
@pytest.mark.parametrize(
    "step",
    [
        WeightOnly(bits=2),
        WeightOnly(bits=3),
        WeightOnly(bits=8),
        WeightOnly(symmetric=True, group_size=None),
        WeightOnly(group_size=8),  # smaller than the kernels' blocks
    ],
    ids=str,
)
def test_all_widths_and_groups_answer_right(model: str, step: WeightOnly, runtime: str, tmp_path: Path) -> None:
    found = made(model, runtime, step, tmp_path)
    assert check_parity(found.loaded, found.candidate, found.context.task.example) < 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("length", [1, 25])
def test_the_length_varies(runtime: str, length: int, make: Callable[..., Made]) -> None:
    found = make("lstm", runtime)
    tokens = TOKENS.repeat(1, 3)[:3, :length]
    with torch.no_grad():
        assert relative(found.loaded()(tokens), found.candidate.module(tokens)) < 1e-5


def test_kernels_of_onnxruntime(make: Callable[..., Made]) -> None:
    transformer = optimised_operators(make("transformer", "onnxruntime").loaded.directory)
    assert transformer["MatMulNBits"] == 6
    assert transformer["GatherBlockQuantized"] == 1
    assert transformer["DequantizeLinear"] == transformer["Cast"] == 0
    lstm = optimised_operators(make("lstm", "onnxruntime").loaded.directory)
    assert lstm["LSTM"] == 2
    assert lstm["DequantizeLinear"] == lstm["Mul"] == lstm["Cast"] == 0  # decoded once, when the file is loaded


def test_four_bits_take_four_bits(make: Callable[..., Made]) -> None:
    graph = onnx.load(str(make("lstm", "onnxruntime").loaded.directory / "model.onnx")).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["layer.weight_hh_l0.gates.q"] == onnx.TensorProto.UINT4
    assert kinds["layer.weight_ih_l1.gates.q"] == onnx.TensorProto.UINT4
    parameters = 24 * 32 + 192 * 32 + 3 * 192 * 48 + 24 * 48
    whole, packed = (make("lstm", "openvino", bits).bytes for bits in (None, 4))
    assert packed < whole / 4.5  # codes, and a scale and a zero point for 16 or 32 of them
    assert packed > parameters / 2


def test_nothing_is_rounded_at_run_time_in_openvino(make: Callable[..., Made]) -> None:
    operators = make("transformer", "openvino").floats()
    assert "FullyConnected x 6" in operators


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("columns", "groups"), [(48, 1), (64, 2), (64, 1), (200, 1), (96, 2)])
def test_blocks_hold_what_was_stored(bits: int, signed: bool, columns: int, groups: int) -> None:
    scheme = QuantScheme(bits=bits, signed=signed)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (5, columns)).to(torch.int16)
    scale = normal(5, groups).abs() + 0.1
    zero = torch.zeros(5, groups) if signed else torch.randint(0, scheme.qmax + 1, (5, groups))
    stored = StoredWeight("w", frozenset({"w"}), codes, scale, zero.to(torch.int16), bits, signed)
    blocks = in_blocks(stored)
    assert blocks is not None
    each, mask = 8 // blocks.bits, (1 << blocks.bits) - 1
    flat = torch.from_numpy(blocks.codes).long().flatten(1)
    unpacked = torch.stack([(flat >> (blocks.bits * place)) & mask for place in range(each)], -1).flatten(1)
    zeros = torch.full(blocks.scale.shape, 1 << (blocks.bits - 1))
    if blocks.zero_point is not None:
        packed = torch.from_numpy(blocks.zero_point).long()
        zeros = torch.stack([(packed >> (blocks.bits * place)) & mask for place in range(each)], -1).flatten(1)
        zeros = zeros[:, : blocks.scale.shape[1]]
    sizes = (torch.from_numpy(blocks.scale), zeros)
    wide = [part.repeat_interleave(blocks.block_size, 1)[:, :columns] for part in sizes]
    found = (unpacked[:, :columns] - wide[1]) * wide[0]
    expected = (codes - expanded(stored.zero_point, (5, columns))) * expanded(scale, (5, columns))
    assert torch.allclose(found, expected.to(found.dtype))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_packed_weights_of_static_plans(runtime: str, tmp_path: Path) -> None:
    context = context_for(seeded(Cnn), CNN_DATA, Target(runtime, threads=1, reduce_range=True))
    sizes = []
    for pack in (True, False):
        directory = tmp_path / str(pack)
        directory.mkdir()
        candidate = quantized(context.original, context, weight_bits=4, edge_bits=4, pack=pack)
        assert candidate.precision == ("int4" if pack else "int8")
        loaded = exported(candidate, context, directory)
        assert check_parity(loaded, candidate, context.task.example) < 0.02
        sizes.append(sum(path.stat().st_size for path in directory.iterdir() if path.suffix != ".xml"))
    assert sizes[0] < sizes[1] - 600  # half a byte for each of 1,440 weights, less what else it takes


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_few_bits_of_activations_saturate_at_their_own_ends(runtime: str, tmp_path: Path) -> None:
    context = context_for(seeded(Cnn), CNN_DATA, Target(runtime, threads=1, reduce_range=True))
    candidate = Static(activation_bits=4, range_method="mse").apply(Candidate(context.original), context)
    loaded = exported(candidate, context, tmp_path)
    assert candidate.simulation is not None
    wild = 10 * CNN_DATA[:6]  # far outside of what was calibrated
    with torch.no_grad():
        assert relative(loaded()(wild), candidate.simulation(wild)) < 0.05
