from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tersor.core.candidate import Candidate
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.errors import RuntimeUnavailableError
from tersor.quantize import Dynamic, WeightOnly
from tersor.runtimes import get_runtime
from tersor.runtimes.integer_linear import IntegerLinear, with_integer_layers
from tersor.runtimes.parity import check_parity
from tersor.runtimes.stored_weights import StoredWeight
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Cnn,
    Mlp,
    Transformer,
    context_for,
    exported,
    normal,
    relative,
    seeded,
)

compiled = pytest.mark.usefixtures("compiler")


@pytest.fixture
def compiler() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")


@pytest.mark.slow
@compiled
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_answers_like_the_original(tmp_path: Path) -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA, Target("inductor", threads=1))
    loaded = exported(Candidate(module), context, tmp_path, model=Cnn)
    assert check_parity(loaded, Candidate(module), context.task.example) < 1e-4
    session = loaded()
    with torch.no_grad():
        for size in (1, 7):
            assert relative(session(CNN_DATA[:size]), module(CNN_DATA[:size])) < 1e-4


@pytest.mark.slow
@compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [Dynamic(), WeightOnly(bits=4, group_size=16)], ids=["dynamic", "int4"])
def test_a_compiled_quantized_model_answers_like_its_simulation(step: Step, tmp_path: Path) -> None:
    module = seeded(Transformer)
    target = Target("inductor", threads=1, dynamic=TEXT_DYNAMIC)
    context = context_for(module, TEXT_DATA, target, output="logits")
    done = step.apply(Candidate(module), context)
    loaded = exported(done, context, tmp_path, model=Transformer)
    assert check_parity(loaded, done, context.task.example) < 0.01
    layers = [layer for layer in loaded().module.modules() if isinstance(layer, IntegerLinear)]
    assert len(layers) == (6 if isinstance(step, Dynamic) else 0)


# --- the integer layer, without a compiler


class Attending(nn.Module):
    """An encoder layer of PyTorch's own, which has a fused path that reads the weights; `[B, T, 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.layer(values)[:, 0])


class Doubled(nn.Linear):
    """Uses its weight in its own way."""

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, 2 * self.weight, self.bias)


class Turned(nn.Module):
    """Layers of GPT-2's class, one of them called twice, a sparse bias, and a subclass; `[B, 12]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(20, 12)
        self.again = nn.ModuleList([nn.Linear(20, 20, bias=False)] * 2)
        self.own = Doubled(20, 4)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        for layer in self.again:
            hidden = layer(hidden).relu()
        return self.own(hidden)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "mlp": (Mlp, MLP_DATA, 3),
    "encoder layer": (Attending, normal(40, 5, 16), 3),
    "turned": (Turned, normal(40, 12), 2),
    "root": (lambda: nn.Linear(12, 4), normal(40, 12), 1),
}


def integer(module: nn.Module, plan: Any) -> nn.Module:
    """The module on the plan's codes."""
    parameters = dict(module.named_parameters())
    weights = {path: StoredWeight.of(quant, parameters[path]) for path, quant in plan.weights.items()}
    return with_integer_layers(module, weights)


@pytest.mark.parametrize("model", MODELS)
def test_integer_layers_answer_like_the_simulation(model: str) -> None:
    build, data, count = MODELS[model]
    module = seeded(build)
    context = context_for(module, data, Target("inductor", threads=1))
    done = Dynamic().apply(Candidate(module), context)
    assert done.simulation is not None
    replaced = integer(done.module, done.plan)
    layers = {layer for layer in replaced.modules() if isinstance(layer, IntegerLinear)}
    assert len(layers) == count
    called: set[nn.Module] = set()
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, result: called.add(layer))
    with torch.inference_mode():
        found, expected, original = replaced(data), done.simulation(data), module(data)
    assert called == layers
    own = model == "turned"  # the simulation rounds the inputs of every linear layer
    assert relative(found, expected) < (0.02 if own else 1e-5)
    assert 1e-4 < relative(found, original) < 0.05


def test_a_layer_with_one_input_stays_float() -> None:
    """`torch._int_mm` multiplies `[B, 1]` with `[1, O]` wrongly; should it be mended, this rule may go."""
    module = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2))
    done = Dynamic().apply(Candidate(module), context_for(module, normal(20, 1), Target("inductor")))
    replaced = integer(done.module, done.plan)
    assert [type(layer) for layer in replaced.children()] == [nn.Linear, nn.ReLU, IntegerLinear]


def test_what_attention_and_recurrent_layers_do_is_told() -> None:
    module = seeded(Attending)
    done = Dynamic().apply(Candidate(module), context_for(module, MODELS["encoder layer"][1], Target("inductor")))
    (note,) = [note for note in done.history[-1].notes if note.startswith("no speed-up")]
    assert "from MultiheadAttention layers: inductor has no kernel" in note


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=2),
    st.integers(2, 40),
    st.integers(1, 9),
    st.booleans(),
    st.floats(-5, 5),
    st.integers(0, 2**16),
)
def test_the_product_is_exact(
    leading: list[int], inputs: int, outputs: int, turned: bool, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int16)
    scale = torch.rand(outputs, 1, generator=generator) + 0.1
    zero = torch.zeros(outputs, 1, dtype=torch.int16)
    bias = nn.Parameter(torch.randn(outputs, generator=generator), requires_grad=False)
    layer = IntegerLinear(StoredWeight("w", frozenset("w"), codes, scale, zero, 8, signed=True), bias, turned=turned)
    values = torch.randn(*leading, inputs, generator=generator) + shift
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    step = (high - low) / 255
    zero_point = (-low / step).round()
    rounded = ((values / step).round() + zero_point).clamp(0, 255) - zero_point
    weight = codes.double() * scale.double()
    expected = rounded.double() @ weight.T * step.double() + bias.double()
    found = layer(values)
    assert found.shape == (*leading, outputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.weight.double(), weight.T if turned else weight)


def test_zeros_give_the_bias_and_nan_is_not_hidden() -> None:
    zero = torch.zeros(2, 1, dtype=torch.int16)
    codes, scale = torch.ones(2, 3, dtype=torch.int16), torch.ones(2, 1)
    layer = IntegerLinear(StoredWeight("w", frozenset("w"), codes, scale, zero, 8, signed=True), None, turned=False)
    assert layer(torch.zeros(4, 3)).abs().max() == 0
    assert bool(layer(torch.tensor([[1.0, float("nan"), 2.0]])).isnan().all())


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailableError, match=r"'inductor' needs a C\+\+ compiler.*apt-get install g\+\+.*CXX"):
        get_runtime("inductor").check_available()
    chosen = tmp_path / "my-compiler"
    chosen.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{chosen} -O2")
    get_runtime("inductor").check_available()
