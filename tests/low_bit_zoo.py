"""Tiny models and helpers for dynamic and weight-only quantization; for tests only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.runtimes import Loaded
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
    integers,
    normal,
    seeded,
)

RUNTIMES = ["onnxruntime", "openvino"]


class Recurrent(nn.Module):
    """Embedding, recurrent layers, head; tokens `[B, T]`, `T` varies."""

    def __init__(self, kind: Any = nn.LSTM, *, bidirectional: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.layer = kind(32, 48, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(96 if bidirectional else 48, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))[0])


class Attention(nn.Module):
    """PyTorch's own attention, whose projections are computed without calling their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, features: Tensor) -> Tensor:
        features = self.first(features)
        return self.head(self.attention(features, features, features, need_weights=False)[0])


class Conv1D(nn.Module):
    """As in transformers: the weight is `[K, O]`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 8)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, features.view(-1, features.size(-1)), self.weight).view(
            *features.shape[:-1], self.weight.shape[1]
        )


TOKENS = integers(24, 48, 10)
TIME = {"tokens": {1: "time"}}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, dict[int, str]], dict[str, Any]]] = {
    "mlp": (Mlp, MLP_DATA, {}, {}),
    "transformer": (lambda: Transformer(24, 32), TEXT_DATA, TEXT_DYNAMIC, {"output": "logits"}),
    "lstm": (Recurrent, TOKENS, TIME, {}),
    "lstm both ways": (lambda: Recurrent(bidirectional=True, layers=1), TOKENS, TIME, {}),
    "gru": (lambda: Recurrent(nn.GRU, bidirectional=True), TOKENS, TIME, {}),
    "rnn": (lambda: Recurrent(nn.RNN, layers=1), TOKENS, TIME, {}),
    "cnn": (Cnn, CNN_DATA, {}, {}),
    "attention": (Attention, normal(48, 6, 16), {"features": {1: "tokens"}}, {}),
    "conv1d of transformers": (lambda: nn.Sequential(Conv1D(16, 12), nn.ReLU(), Conv1D(4, 16)), MLP_DATA, {}, {}),
}


@dataclass(frozen=True)
class Made:
    """One model, quantized and written."""

    candidate: Candidate
    context: Context
    loaded: Loaded

    @property
    def bytes(self) -> int:
        """On disk, without the text of OpenVINO's graph."""
        return sum(path.stat().st_size for path in self.loaded.directory.iterdir() if path.suffix != ".xml")

    def floats(self) -> list[str]:
        """What computes in float by the runtime's own word."""
        loaded = self.loaded
        example = self.context.task.example(1)
        return loaded.runtime.float_operators(
            loaded.directory, example, signature=loaded.signature, target=loaded.target
        )


def context_of(model: str, runtime: str = "onnxruntime", *, reduce_range: bool = False) -> Context:
    """What steps see of one of the models."""
    build, data, dynamic, fields = MODELS[model]
    target = Target(runtime, threads=1, reduce_range=reduce_range, dynamic=dynamic)
    return context_for(seeded(build), data, target, **fields)


def made(model: str, runtime: str, step: Step | None, directory: Path) -> Made:
    """Quantizes and exports."""
    context = context_of(model, runtime)
    candidate = Candidate(frozen_copy(context.original))
    candidate = candidate if step is None else step.apply(candidate, context)
    return Made(candidate, context, exported(candidate, context, directory))


def optimised_operators(directory: Path) -> Counter[str]:
    """What is left of `model.onnx` after ONNX Runtime's own fusions."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(directory / "optimised.onnx")
    onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(directory / "optimised.onnx").graph.node)
