from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.target import Target
from tersor.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    ParityError,
    RuntimeUnavailableError,
    TersorError,
    UnsupportedError,
)
from tersor.prune import Unstructured
from tersor.quantize import Static
from tersor.runtimes import RUNTIMES, Loaded, Runtime, get_runtime
from tersor.runtimes.eager import Eager
from tersor.runtimes.onnxruntime import OnnxRuntime
from tersor.runtimes.parity import check_parity
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Branching,
    Cnn,
    Mlp,
    Transformer,
    context_for,
    exported,
    quantized,
    relative,
    seeded,
    signature_for,
)


def context(module: nn.Module, data: Any, runtime: str, **fields: Any) -> Context:
    return context_for(module, data, Target(runtime, threads=1, reduce_range=True), **fields)


# --- parity


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Candidate, Context, Loaded]]:
    module = seeded(Cnn)
    where = context(module, CNN_DATA, "onnxruntime")
    made = {"float32": Candidate(frozen_copy(module)), "int8": quantized(module, where)}
    return {
        precision: (candidate, where, exported(candidate, where, tmp_path_factory.mktemp(precision)))
        for precision, candidate in made.items()
    }


def tampered(loaded: Loaded, directory: Path, parameter: str) -> Loaded:
    """A copy of an ONNX artifact with one weight tensor changed."""
    model = onnx.load(str(loaded.directory / "model.onnx"))
    names = [tensor.name for tensor in model.graph.initializer]
    (chosen,) = [
        tensor for tensor in model.graph.initializer if tensor.name.startswith(parameter) and np.prod(tensor.dims) > 100
    ] or pytest.fail(f"{parameter} is not among {names}")
    array = onnx.numpy_helper.to_array(chosen)
    chosen.CopyFrom(onnx.numpy_helper.from_array(-array[::-1], chosen.name))
    onnx.save(model, str(directory / "model.onnx"))
    return Loaded(loaded.runtime, directory, loaded.signature, loaded.target)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("layer", ["stem", "block.0", "head"])
def test_a_tampered_file_is_refused_naming_the_first_layer(
    layer: str, precision: str, cnn: dict[str, tuple[Candidate, Context, Loaded]], tmp_path: Path
) -> None:
    candidate, where, loaded = cnn[precision]
    changed = tampered(loaded, tmp_path, f"{layer}.weight")
    with pytest.raises(ParityError) as caught:
        check_parity(changed, candidate, where.task.example)
    assert "'onnxruntime' differs from PyTorch at batch 1" in str(caught.value)
    assert f"the first layer that disagrees is '{layer}'" in str(caught.value)
    assert isinstance(caught.value, ExportError)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Candidate, Context, Loaded]]:
    """The same network on the other runtimes."""

    @cache
    def make(runtime: str) -> tuple[Candidate, Context, Loaded]:
        module = seeded(Cnn)
        where, fields = context(module, CNN_DATA, runtime), {"model": Cnn} if runtime == "eager" else {}
        return Candidate(module), where, exported(Candidate(module), where, tmp_path_factory.mktemp(runtime), **fields)

    return make


@pytest.mark.parametrize("runtime", ["eager", "openvino"])
def test_a_wrong_model_is_refused_whatever_the_runtime_can_show(
    runtime: str, elsewhere: Callable[[str], tuple[Candidate, Context, Loaded]]
) -> None:
    candidate, where, loaded = elsewhere(runtime)
    assert check_parity(loaded, candidate, where.task.example) < 1e-5
    other = frozen_copy(candidate.module)
    with torch.no_grad():
        other.get_parameter("block.0.weight").mul_(-1)
    with pytest.raises(ParityError, match=f"'{runtime}' differs from PyTorch at batch 1") as caught:
        check_parity(loaded, Candidate(other), where.task.example)
    said = "the layer is unknown" if runtime == "eager" else "the first layer that disagrees is 'block.0'"
    assert said in str(caught.value)


def test_nan_is_no_parity(cnn: dict[str, tuple[Candidate, Context, Loaded]], tmp_path: Path) -> None:
    candidate, where, loaded = cnn["float32"]
    model = onnx.load(str(loaded.directory / "model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.nan, np.float32), tensor.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    changed = Loaded(loaded.runtime, tmp_path, loaded.signature, loaded.target)
    with pytest.raises(ParityError, match="'head'"):
        check_parity(changed, candidate, where.task.example)


def test_a_difference_only_at_another_length_is_found(tmp_path: Path) -> None:
    module = seeded(Transformer)
    target = Target("eager", threads=1, dynamic=TEXT_DYNAMIC)
    where = context_for(module, TEXT_DATA, target, output="logits")

    class Deceitful(Transformer):
        """Answers differently to short inputs."""

        def forward(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            found = super().forward(input_ids, mask)
            return found if input_ids.shape[1] == 6 else {"logits": found["logits"] + 1}

    loaded = exported(Candidate(module), where, tmp_path, model=Deceitful)
    with pytest.raises(ParityError, match="at tokens = 3"):
        check_parity(loaded, Candidate(module), where.task.example)


# --- eager


def test_an_eager_artifact_needs_the_class(tmp_path: Path) -> None:
    module = seeded(Mlp)
    where = context(module, MLP_DATA, "eager")
    loaded = exported(Candidate(module), where, tmp_path)
    with pytest.raises(ArtifactError, match=r"weights only; give the class: tersor\.load\(directory, model=build\)"):
        loaded()
    session = exported(Candidate(module), where, tmp_path, model=Mlp)()
    with torch.no_grad():
        assert torch.allclose(session(MLP_DATA), module(MLP_DATA), atol=1e-6)
    assert isinstance(session(MLP_DATA.numpy()), np.ndarray)


@pytest.mark.parametrize(
    "build", [Cnn, lambda: Mlp(classes=9), lambda: nn.Linear(12, 4)], ids=["class", "size", "linear"]
)
def test_weights_that_do_not_fit_the_class_are_refused(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = seeded(Mlp)
    loaded = exported(Candidate(module), context(module, MLP_DATA, "eager"), tmp_path, model=build)
    with pytest.raises(ArtifactError, match=r"model\.safetensors do not fit the module that model\(\) returned"):
        loaded()


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_a_truncated_artifact_is_refused(
    runtime: str,
    cnn: dict[str, tuple[Candidate, Context, Loaded]],
    elsewhere: Callable[[str], tuple[Candidate, Context, Loaded]],
    tmp_path: Path,
) -> None:
    _, _, loaded = cnn["float32"] if runtime == "onnxruntime" else elsewhere(runtime)
    for path in loaded.directory.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content if path.suffix == ".bin" else content[: len(content) // 2])
    with pytest.raises(ArtifactError if runtime == "eager" else ExportError):
        replace(loaded, directory=tmp_path)()


def test_eager_stores_tied_weights_once_and_ties_them_again(tmp_path: Path) -> None:
    module = seeded(Transformer)
    where = context_for(module, TEXT_DATA, Target("eager", threads=1), output="logits")
    loaded = exported(Candidate(module), where, tmp_path, model=Transformer)
    size = sum(parameter.numel() for parameter in module.parameters()) * 4  # tied ones count once
    assert size <= (tmp_path / "model.safetensors").stat().st_size < size + 2500
    batch = where.task.example(3)
    with torch.no_grad():
        assert relative(batch.call(loaded()), batch.call(module)["logits"]) < 1e-6


@pytest.mark.parametrize("runtime", ["eager", "inductor"])
def test_int8_on_pytorch_is_refused(runtime: str, tmp_path: Path) -> None:
    module = seeded(Mlp)
    where = context(module, MLP_DATA, runtime)
    with pytest.raises(UnsupportedError, match=f"'{runtime}' has no integer kernels"):
        exported(quantized(module, where), where, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match=rf"quantize\.static produces int8, but runtime '{runtime}' runs only"):
        get_runtime(runtime).check_supports(Static().precision, "quantize.static")
    get_runtime(runtime).check_supports(Unstructured(sparsity=0.5).precision, "prune.unstructured")
    get_runtime("onnxruntime").check_supports(Static().precision, "quantize.static")


# --- models and packages that are not there


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_model_that_cannot_be_traced_says_so(runtime: str, tmp_path: Path) -> None:
    module = seeded(Branching)
    with pytest.raises(TersorError, match="could not trace Branching"):
        exported(Candidate(module), context(module, MLP_DATA, runtime), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_openvino_cannot_take_is_named(tmp_path: Path) -> None:
    module = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ExportError, match=r"OpenVINO could not convert the model: .*Failed operations.*Conv"):
        exported(Candidate(module), context(module, CNN_DATA, "openvino"), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Missing(OnnxRuntime):
    name: ClassVar[str] = "missing"
    package: ClassVar[str] = "a_package_that_does_not_exist"


class MissingExtra(Missing):
    extra: ClassVar[str] = "nowhere"


@pytest.mark.parametrize(
    ("runtime", "command"),
    [(Missing(), "pip install a_package_that_does_not_exist"), (MissingExtra(), r"pip install 'tersor\[nowhere\]'")],
)
def test_a_runtime_that_is_not_installed_says_how_to_get_it(runtime: Runtime, command: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=f"'missing' needs .*{command}$") as caught:
        runtime.check_available()
    assert isinstance(caught.value, ImportError)
    assert "a_package_that_does_not_exist" not in sys.modules


def test_every_runtime_of_ours_is_installed_here_and_has_its_name() -> None:
    assert set(RUNTIMES) == {"eager", "inductor", "onnxruntime", "openvino"}
    for name, kind in RUNTIMES.items():
        runtime = get_runtime(name)
        assert type(runtime) is kind
        assert runtime.name == name
        runtime.check_available()


def test_an_unknown_runtime_is_refused_naming_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Target\.runtime.*'onnxruntime'.*got 'tensorrt'"):
        get_runtime("tensorrt")


def test_an_input_that_does_not_exist_cannot_vary() -> None:
    module = seeded(Mlp)
    wrong = context_for(module, MLP_DATA, Target("onnxruntime", threads=1, dynamic={"x": {1: "t"}}))
    with pytest.raises(ConfigError, match=r"\['features'\], got \['x'\]"):
        signature_for(wrong)
    with pytest.raises(ConfigError, match=r"\['features'\], got \['x'\]"):
        quantized(module, wrong)


def test_eager_writes_nothing_but_weights(tmp_path: Path) -> None:
    module = seeded(Mlp)
    paths = Eager().export(
        Candidate(module),
        context(module, MLP_DATA, "eager").task.example(2),
        tmp_path,
        signature=signature_for(context(module, MLP_DATA, "eager")),
        target=Target("eager", threads=1),
    )
    assert paths == list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]
