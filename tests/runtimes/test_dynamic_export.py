from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from low_bit_zoo import MODELS, RUNTIMES, TIME, TOKENS, Made, Recurrent, made, optimised_operators
from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.target import Target
from tersor.errors import ExportError, ParityError
from tersor.quantize import Dynamic
from tersor.runtimes import get_runtime
from tersor.runtimes.parity import check_parity
from zoo import MLP_DATA, Mlp, context_for, exported, relative, seeded

SLOW = {"lstm both ways", "rnn", "attention", "conv1d of transformers"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    @cache
    def build(model: str, runtime: str, quantized: bool = True) -> Made:
        return made(model, runtime, Dynamic() if quantized else None, tmp_path_factory.mktemp("artifact"))

    return build


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MODELS])
def test_it_answers_like_its_simulation_and_is_smaller(model: str, runtime: str, make: Callable[..., Made]) -> None:
    found = make(model, runtime)
    assert check_parity(found.loaded, found.candidate, found.context.task.example) < 0.02
    assert found.bytes < make(model, runtime, False).bytes


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("model", ["lstm", "gru"])
@pytest.mark.parametrize("length", [1, 3, 25])
def test_recurrent_models_take_every_length(
    model: str, quantized: bool, length: int, runtime: str, make: Callable[..., Made]
) -> None:
    found = make(model, runtime, quantized)
    tokens = TOKENS.repeat(1, 3)[:5, :length]
    with torch.no_grad():
        expected = found.candidate.runnable(tokens)
    answer = found.loaded()(tokens)
    assert answer.shape == (5, length, 24)
    assert relative(answer, expected) < (0.02 if quantized else 1e-5)


def test_fused_integer_kernels_run(make: Callable[..., Made]) -> None:
    transformer = optimised_operators(make("transformer", "onnxruntime").loaded.directory)
    assert transformer["DynamicQuantizeLinear"] == 1  # query, key and value share their input
    assert transformer["MatMulIntegerToFloat"] == 3
    assert transformer["DynamicQuantizeMatMul"] == 3
    assert transformer["MatMulInteger"] == transformer["DequantizeLinear"] == 0
    lstm = optimised_operators(make("lstm", "onnxruntime").loaded.directory)
    assert lstm["DynamicQuantizeLSTM"] == 2
    assert lstm["LSTM"] == lstm["MatMul"] == lstm["DequantizeLinear"] == 0
    gru = optimised_operators(make("gru", "onnxruntime").loaded.directory)
    assert gru["GRU"] == 2  # decoded when the file is loaded
    assert gru["DequantizeLinear"] == gru["Mul"] - 1 == 0  # the one product is the embedding's


def test_codes_are_bytes_and_stored_once(make: Callable[..., Made]) -> None:
    for model, largest in (("transformer", 24 * 32), ("lstm", 24 * 32)):
        graph = onnx.load(str(make(model, "onnxruntime").loaded.directory / "model.onnx")).graph
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
        assert sum(array.dtype == np.int8 and array.shape == (24, 32) for array in arrays) == 1
        assert not any(array.dtype == np.float32 and array.size >= largest for array in arrays)


def test_openvino_rounds_only_where_that_was_asked_for(make: Callable[..., Made]) -> None:
    for quantized in (True, False):
        found = make("mlp", "openvino", quantized)
        assert any("FullyConnected" in operator for operator in found.floats()) is not quantized
    assert any("RNNSeq" in operator for operator in make("lstm", "openvino").floats())  # it has no such kernel


def test_weights_that_are_not_in_the_file_are_an_error(tmp_path: Path) -> None:
    context = context_for(seeded(Mlp), MLP_DATA, Target("onnxruntime", threads=1, reduce_range=False))
    done = Dynamic().apply(Candidate(frozen_copy(context.original)), context)

    class Doubled(Mlp):
        def forward(self, features: Tensor) -> Tensor:
            hidden = nn.functional.relu(nn.functional.linear(features, 2 * self.first.weight))
            return self.last(nn.functional.relu(self.second(hidden)))

    other = Doubled()
    other.load_state_dict(done.module.state_dict())
    moved = Candidate(other.eval(), plan=done.plan, simulation=done.simulation)
    with pytest.raises(ExportError, match=r"1 quantized weights are not in the exported graph.*'first\.weight'"):
        exported(moved, context, tmp_path)
    with torch.no_grad():
        done.module.get_parameter("last.weight").mul_(1.01)
    with pytest.raises(ExportError, match=r"'last\.weight' is not on the grid of its quantization plan"):
        exported(done, context, tmp_path)


def test_a_difference_is_told_without_a_captured_graph(make: Callable[..., Made]) -> None:
    found = make("lstm", "onnxruntime")
    wrong = Candidate(found.candidate.module, plan=found.candidate.plan, simulation=seeded(Recurrent, 1))
    with pytest.raises(ParityError, match="the layer is unknown"):
        check_parity(found.loaded, wrong, found.context.task.example)


class Deciding(nn.Module):
    """A recurrent model that decides by its data: tracing would fix the decision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent(layers=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens) if bool(tokens.sum() > 3) else self.inner(tokens + 1)


def test_a_decision_by_data_is_refused_where_it_stands(tmp_path: Path) -> None:
    context = context_for(seeded(Deciding), TOKENS, Target("onnxruntime", threads=1, dynamic=TIME))
    with pytest.raises(ExportError, match=r"a decision of the model depends on its input.*test_dynamic_export\.py"):
        exported(Candidate(frozen_copy(context.original)), context, tmp_path)


class WithState(nn.Module):
    """Hands its state in; two inputs by name, no batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, values: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        state = hidden[None].contiguous()
        output, _ = self.layer(values.transpose(0, 1), (state, torch.zeros_like(state)))
        return {"all": output, "last": self.head(output[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_states_names_and_selected_outputs_survive_tracing(runtime: str, tmp_path: Path) -> None:
    data = {"values": torch.randn(30, 6, 16), "hidden": torch.randn(30, 24)}
    target = Target(runtime, threads=1, reduce_range=False, dynamic={"values": {1: "time"}})
    context = context_for(seeded(WithState), data, target, output="last")
    done = Dynamic().apply(Candidate(frozen_copy(context.original)), context)
    loaded = exported(done, context, tmp_path)
    batch = Batch((), {"values": data["values"][:3, :2], "hidden": data["hidden"][:3]}, None)
    assert done.simulation is not None
    with torch.no_grad():
        assert relative(batch.call(loaded()), done.simulation(*batch.tensors().values())) < 0.02


def test_runtimes_without_such_kernels_refuse_before_work() -> None:
    with pytest.raises(Exception, match="int8-dynamic"):
        get_runtime("eager").check_supports(Dynamic().precision, "quantize.dynamic")
    for runtime in (*RUNTIMES, "inductor"):
        get_runtime(runtime).check_supports(Dynamic().precision, "quantize.dynamic")
