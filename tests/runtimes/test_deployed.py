from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.target import Target
from tersor.errors import ConfigError
from tersor.runtimes import Loaded, Session
from tersor.runtimes.parity import check_parity
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    TOWER_DATA,
    TWO_DATA,
    Cnn,
    Mlp,
    SharedTower,
    Transformer,
    TwoInputs,
    context_for,
    exported,
    quantized,
    relative,
    seeded,
)

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "cnn": (Cnn, CNN_DATA, {}),
    "mlp": (Mlp, MLP_DATA, {}),
    "two inputs": (TwoInputs, (TWO_DATA["image"], TWO_DATA["table"], torch.arange(48) % 3), {}),
    "shared tower": (SharedTower, TOWER_DATA, {}),
    "transformer": (Transformer, TEXT_DATA, {"output": "logits"}),  # names, tied weights, varying length, dict output
}
SLOW = {("mlp", "openvino"), ("two inputs", "openvino"), ("shared tower", "openvino"), ("shared tower", "onnxruntime")}
DEPLOYED = [
    pytest.param(
        *(model, runtime, precision),
        marks=[pytest.mark.slow] if precision == "float32" and (model, runtime) in SLOW else [],
    )
    for model in MODELS
    for runtime in ("onnxruntime", "openvino")
    for precision in ("float32", "int8")
]


@dataclass(frozen=True)
class Deployed:
    """One model in one runtime."""

    candidate: Candidate
    context: Context
    loaded: Loaded
    session: Session

    def expected(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            if self.candidate.simulation is not None:
                found: Tensor = self.candidate.simulation(*batch.tensors().values())
                return found
            return select_output(batch.call(self.context.original), self.context.task.output)


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Deployed]:
    @cache
    def make(model: str, runtime: str, precision: str) -> Deployed:
        build, data, fields = MODELS[model]
        module = seeded(build)
        dynamic = TEXT_DYNAMIC if model == "transformer" else {}
        # Seven bits: this must also hold on processors whose int8 kernels overflow with eight.
        context = context_for(module, data, Target(runtime, threads=1, reduce_range=True, dynamic=dynamic), **fields)
        candidate = quantized(module, context) if precision == "int8" else Candidate(frozen_copy(module))
        loaded = exported(candidate, context, tmp_path_factory.mktemp("artifact"))
        return Deployed(candidate, context, loaded, loaded())

    return make


@pytest.mark.parametrize(("model", "runtime", "precision"), DEPLOYED)
@pytest.mark.parametrize("size", [1, 7])
def test_a_deployed_model_answers_like_pytorch(
    model: str, runtime: str, precision: str, size: int, deploy: Callable[..., Deployed]
) -> None:
    deployed = deploy(model, runtime, precision)
    batch = deployed.context.task.splits["calibrate"].batch(range(10, 10 + size))
    found, expected = batch.call(deployed.session), deployed.expected(batch)
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    if precision == "float32":
        assert relative(found, expected) < 1e-5
    else:
        with torch.no_grad():
            original = select_output(batch.call(deployed.context.original), deployed.context.task.output)
        assert relative(found, expected) < 0.02  # a tie may round to the other code
        assert 1e-4 < relative(found, original) < 0.1


@pytest.mark.parametrize(("model", "runtime", "precision"), DEPLOYED)
def test_parity_holds(model: str, runtime: str, precision: str, deploy: Callable[..., Deployed]) -> None:
    deployed = deploy(model, runtime, precision)
    worst = check_parity(deployed.loaded, deployed.candidate, deployed.context.task.example)
    assert 0 <= worst < (1e-5 if precision == "float32" else 0.02)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_length_varies_where_that_was_declared(
    runtime: str, precision: str, length: int, deploy: Callable[..., Deployed]
) -> None:
    deployed = deploy("transformer", runtime, precision)
    mask, ids = TEXT_DATA["mask"][:3, :length, :length], TEXT_DATA["input_ids"][:3, :length]
    found = deployed.session(input_ids=ids, mask=mask)
    assert found.shape == (3, length, 24)
    assert relative(found, deployed.expected(Batch((), {"mask": mask, "input_ids": ids}, None))) < 0.02


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_session_takes_arrays_and_tensors_by_position_and_by_name(
    runtime: str, deploy: Callable[..., Deployed]
) -> None:
    session = deploy("two inputs", runtime, "int8").session
    image, table = TWO_DATA["image"][:2], TWO_DATA["table"][:2]
    by_tensor, by_array = session(image, table), session(image.numpy(), table.numpy())
    assert isinstance(by_tensor, Tensor)
    assert isinstance(by_array, np.ndarray)
    assert np.array_equal(by_tensor.numpy(), by_array)
    assert np.array_equal(session(table=table.numpy(), image=image.numpy()), by_array)
    assert np.array_equal(session(image.numpy(), table=table.numpy()), by_array)
    assert isinstance(session(image, table.numpy()), Tensor)  # one tensor among the inputs is enough
    turned = image.transpose(2, 3).contiguous().transpose(2, 3)  # the same values, another layout
    assert not turned.is_contiguous()
    assert torch.equal(session(turned, table), by_tensor)
    with pytest.raises(ConfigError, match=r"\['image', 'table'\]"):
        session(image)
    later = session(2 * image, table)
    assert not torch.equal(later, by_tensor)
    assert np.array_equal(by_tensor.numpy(), by_array)  # an answer is not overwritten by the next call


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_recipe_for_loading_travels_to_other_processes(runtime: str, deploy: Callable[..., Deployed]) -> None:
    deployed = deploy("mlp", runtime, "int8")
    session = pickle.loads(pickle.dumps(deployed.loaded))()  # noqa: S301 - our own
    assert torch.equal(session(MLP_DATA[:3]), deployed.session(MLP_DATA[:3]))


def initializers(deployed: Deployed) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(str(deployed.loaded.directory / "model.onnx"))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_int8_is_stored_and_computed_as_integers(deploy: Callable[..., Deployed]) -> None:
    deployed = deploy("cnn", "onnxruntime", "int8")
    stored = initializers(deployed)
    codes = {name: array for name, array in stored.items() if array.dtype == np.int8 and array.size > 8}
    assert sorted(array.size for array in codes.values()) == [8 * 3 * 9, 8 * 8 * 9, 5 * 128]
    assert all(np.abs(array).max() == 63 for array in codes.values())  # seven bits
    assert not any(array.dtype == np.float32 and array.size > 8 for array in stored.values())
    floats = deployed.loaded.runtime.float_operators(
        deployed.loaded.directory,
        deployed.context.task.example(1),
        signature=deployed.loaded.signature,
        target=deployed.loaded.target,
    )
    assert floats == []
    plain = deploy("cnn", "onnxruntime", "float32")
    floats = plain.loaded.runtime.float_operators(
        plain.loaded.directory,
        plain.context.task.example(1),
        signature=plain.loaded.signature,
        target=plain.loaded.target,
    )
    assert any("Conv" in operator for operator in floats)


def test_a_weight_that_two_layers_share_is_stored_once(deploy: Callable[..., Deployed]) -> None:
    stored = initializers(deploy("shared tower", "onnxruntime", "int8"))
    assert sum(array.dtype == np.int8 and array.size == 8 * 16 for array in stored.values()) == 1


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_files_are_smaller(runtime: str, deploy: Callable[..., Deployed]) -> None:
    def weights(precision: str) -> int:
        directory: Path = deploy("transformer", runtime, precision).loaded.directory
        return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".onnx", ".bin"))

    assert weights("int8") < weights("float32")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_empty_channels_keep_their_bias_on_the_runtime(runtime: str, tmp_path: Path) -> None:
    """A bias beside weights of zero must not overflow int32: such channels give nothing but their bias."""
    module = seeded(Cnn)
    with torch.no_grad():
        module.get_parameter("block.0.weight")[1] = 0
        module.get_parameter("stem_norm.weight")[3] = 0
        module.get_parameter("head.weight")[2] = 0
        module.get_parameter("head.bias")[2] = 5.0
    context = context_for(module, CNN_DATA, Target(runtime, threads=1, reduce_range=True))
    loaded = exported(quantized(module, context), context, tmp_path)
    with torch.no_grad():
        found, expected = loaded()(CNN_DATA[:5]), module(CNN_DATA[:5])
    assert torch.allclose(found[:, 2], torch.tensor(5.0), atol=1e-3)
    assert relative(found, expected) < 0.05
