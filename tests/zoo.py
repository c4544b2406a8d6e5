"""Tiny models, and the few lines that bring one through capture, quantization and export; for tests only.

Shapes: `B` batch, `T` tokens, `C` channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.signature import Signature, dynamic_dimensions, input_names, signature_of
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.graph import capture
from tersor.quantize import Static
from tersor.runtimes import Loaded, get_runtime


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module whose random weights do not depend on the test order, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return disturbed(build()).eval()


def disturbed(module: nn.Module) -> nn.Module:
    """Gives every BatchNorm statistics as training would, and scales of which some are negative."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 2.0)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
                with torch.no_grad():
                    layer.weight[::3] *= -1
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that do not depend on the test order."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random integers below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Cnn(nn.Module):
    """Conv-BN-ReLU, a residual sum, pooling, a linear layer; images `[B, 3, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        image = functional.relu(self.stem_norm(self.stem(image)))
        image = functional.relu(image + self.block(image))
        return self.head(self.pool(image).flatten(1))


class Mlp(nn.Module):
    """Linear layers only; `[B, 12]`."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(functional.relu(self.second(functional.relu(self.first(features)))))


class TwoInputs(nn.Module):
    """An image branch and a table branch, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 8, 3)
        self.table = nn.Linear(6, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        seen = functional.relu(self.image(image)).mean((2, 3))
        return self.head(torch.cat([seen, functional.relu(self.table(table))], dim=1))


class SharedTower(nn.Module):
    """One encoder for two inputs of very different size, as in siamese networks; `[B, T, 8]` each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.encoder.bias.mul_(20)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(functional.relu(self.encoder(left)) + functional.relu(self.encoder(right))).mean(1)


class Transformer(nn.Module):
    """One attention block with an embedding tied to the output layer; keywords in, a dict out; `T` varies."""

    def __init__(self, vocabulary: int = 24, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / math.sqrt(hidden.shape[-1])
        scores = scores.masked_fill(mask == 0, -1e4)
        hidden = self.norm(hidden + torch.softmax(scores, -1) @ self.value(hidden))
        hidden = hidden + self.narrow(functional.gelu(self.wide(hidden)))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Sized(nn.Module):
    """Conv, BN, ReLU, mean, linear in one, two or three dimensions."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.convolution = convolution(2, 8, 3)
        self.norm = norm(8)
        self.head = nn.Linear(8, 3)
        self.axes = tuple(range(2, 2 + dimensions))

    def forward(self, values: Tensor) -> Tensor:
        return self.head(functional.relu(self.norm(self.convolution(values))).mean(self.axes))


class Depthwise(nn.Module):
    """Pointwise, depthwise and grouped convolutions; `[B, 4, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        image = functional.relu6(self.pointwise(image))
        image = functional.relu(self.norm(self.depthwise(image)))
        return self.head(functional.relu(self.grouped(image)).mean((2, 3)))


class Branching(nn.Module):
    """Decides by the data which layer runs: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(12, 4)
        self.large = nn.Linear(12, 4)

    def forward(self, features: Tensor) -> Tensor:
        if features.abs().mean() > 1:
            return self.large(features)
        return self.small(features)


class Scaling(nn.Module):
    """Has parameters, but no layer that int8 kernels exist for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12, 12))

    def forward(self, features: Tensor) -> Tensor:
        return features @ torch.tanh(self.scale)


CNN_DATA = normal(48, 3, 8, 8)
MLP_DATA = normal(48, 12)
TWO_DATA = {"image": normal(48, 1, 6, 6), "table": normal(48, 6, seed=1)}
TOWER_DATA = {"left": normal(48, 4, 8), "right": 30 * normal(48, 4, 8, seed=1)}
TEXT_DATA = {
    "mask": (integers(5, 48, 6, 6, seed=2) > 0).long() | torch.eye(6, dtype=torch.long),
    "input_ids": integers(24, 48, 6),
}
TEXT_DYNAMIC = {"input_ids": {1: "tokens"}, "mask": {1: "tokens", 2: "tokens"}}


def context_for(module: nn.Module, data: Any, target: Target | None = None, *, seed: int = 0, **fields: Any) -> Context:
    """What steps see; `data` is the calibrate split unless `fields` names splits."""
    splits = fields if {"train", "calibrate", "report"} & set(fields) else {"calibrate": data, **fields}
    return Context(Task(**splits), target or Target(threads=1, reduce_range=False), frozen_copy(module), seed)


def quantized(module: nn.Module, context: Context, **settings: Any) -> Candidate:
    """The module in int8."""
    return Static(**settings).apply(Candidate(frozen_copy(module)), context)


def captured(
    module: nn.Module, batch: Batch, dynamic: Mapping[str, dict[int, str]] | None = None, output: Any = None
) -> fx.GraphModule:
    """The module's graph, its batch dynamic."""
    names = input_names(module, batch)
    dims = dynamic_dimensions(names, Target(dynamic=dict(dynamic or {})))
    return capture(module, batch, names=names, dynamic=dims, output=output)


def signature_for(context: Context) -> Signature:
    """Inputs and output of the context's original model."""
    example = context.task.example(2)
    with torch.no_grad():
        output = select_output(example.call(context.original), context.task.output)
    names = input_names(context.original, example)
    return signature_of(names, example, output, context.target, context.task.output)


def exported(candidate: Candidate, context: Context, directory: Path, **fields: Any) -> Loaded:
    """The candidate written for the context's runtime."""
    runtime, signature = get_runtime(context.target.runtime), signature_for(context)
    runtime.export(candidate, context.task.example(2), directory, signature=signature, target=context.target)
    return Loaded(runtime, directory, signature, context.target, **fields)


def state_hash(module: nn.Module) -> str:
    """Hash of every parameter and buffer, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def relative(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖``."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
