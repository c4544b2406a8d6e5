"""Prepared graphs, and models that ask much of what works on them layer by layer; for tests only.

Shapes: `B` batch, `T` tokens, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.target import Target
from tersor.graph import fold_batch_norm
from tersor.quantize.prepare import Batches, Prepared, along, prepare, set_activation_ranges, set_weight_ranges
from tersor.quantize.widths import Widths
from zoo import captured, context_for, normal, seeded


class Parallel(nn.Module):
    """Two layers side by side before either's activation function, a residual sum in place, sizes as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        left, right = self.left(image), self.right(image)
        image = functional.relu(left) + functional.relu(right)
        image += self.block(image)
        return self.head(image.relu_().view(image.size(0), 8, -1).mean(2))


class Learned(nn.Module):
    """A layer on a constant, a layer that is called twice, a bias that is computed, a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 5, 12))
        self.query = nn.Linear(12, 12)
        self.key = nn.Linear(12, 12, bias=False)
        self.twice = nn.Linear(12, 12)
        self.computed = nn.Linear(12, 12)
        self.unused = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, features: Tensor) -> Tensor:
        keys = self.key(features)
        keys = self.twice(functional.relu(self.twice(keys)))
        scores = self.query(self.queries[:, :, None]).squeeze(2) * keys[:, None]
        inner = functional.linear(scores, self.computed.weight, self.computed.bias * 2)
        return self.head(functional.relu(inner))


class Parts(nn.Module):
    """Grouped and depthwise convolutions in 1, 2 or 3 dimensions, strided and dilated, with every kind of padding."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.strided = convolution(4, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = convolution(8, 8, 3, padding=2, dilation=2, groups=2)
        self.depthwise = convolution(8, 8, 2, padding="same", groups=8)
        self.last = convolution(8, 6, 1, padding="valid")
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        values = functional.relu(self.grouped(functional.relu(self.strided(values))))
        return self.head(functional.relu(self.last(functional.relu(self.depthwise(values)))).flatten(2).transpose(1, 2))


PARTS_DATA = {1: normal(24, 4, 16), 2: normal(24, 4, 8, 8), 3: normal(24, 4, 6, 6, 6)}


@dataclass(frozen=True)
class Ready:
    """A prepared graph with all ranges set, its examples and the model that it was made from."""

    prepared: Prepared
    batches: Batches
    module: nn.Module

    def outputs(self) -> Tensor:
        """What the simulation answers on all examples."""
        return answers(self.prepared.simulation, self.batches)

    def expected(self) -> Tensor:
        """What the model answers."""
        with torch.no_grad():
            return torch.cat([batch.call(self.module) for batch in self.batches()])


def ready(build: Callable[[], nn.Module], data: Any, batch_size: int = 16, **widths: Any) -> Ready:
    """Prepares and calibrates; the last batch may be smaller."""
    module = seeded(build)
    context = context_for(module, data, Target("eager", threads=1, reduce_range=False))
    prepared = prepare(Candidate(frozen_copy(module)), context, "test", Widths(**widths))
    split = context.task.splits["calibrate"]
    parts = [range(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]

    def batches() -> list[Batch]:
        return [split.batch(part) for part in parts]

    set_activation_ranges(prepared, "minmax", batches)
    set_weight_ranges(prepared)
    return Ready(prepared, batches, module)


def answers(graph_module: nn.Module, batches: Batches) -> Tensor:
    """What a graph answers on all examples."""
    with torch.no_grad():
        return torch.cat([graph_module(*batch.tensors().values()) for batch in batches()])


def folded(module: nn.Module, example: Tensor) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The graph without BatchNorm, and what that multiplied the weights by."""
    graph_module = captured(module, Batch((example,), {}, None))
    norms = fold_batch_norm(graph_module)
    return graph_module, {
        path: along(norm.factor, norm.axis, graph_module.get_parameter(path).ndim) for path, norm in norms.items()
    }


def undone(graph_module: fx.GraphModule, units: dict[str, Tensor], module: nn.Module) -> float:
    """Largest difference of a weight, its units taken out again, from the stored one, relative to its layer."""
    worst = 0.0
    for path, unit in units.items():
        stored, found = module.get_parameter(path).detach(), graph_module.get_parameter(path).detach() / unit
        worst = max(worst, float((found - stored).abs().max() / stored.abs().max()))
    return worst
