from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.graph import fold_batch_norm
from tersor.graph.fold import FoldedNorm
from zoo import captured, disturbed, normal, relative, seeded

BATCH_NORM = torch.ops.aten.batch_norm.default


def folded(build: Callable[[], nn.Module], x: Tensor) -> tuple[nn.Module, fx.GraphModule, dict[str, FoldedNorm]]:
    module = seeded(build)
    graph_module = captured(module, Batch((x[:2],), {}, None))
    return module, graph_module, fold_batch_norm(graph_module)


def norms(graph_module: fx.GraphModule) -> int:
    return sum(node.target is BATCH_NORM for node in graph_module.graph.nodes)


EXACT = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7)), normal(5, 3, 6, 6)),
    "conv2d with bias": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3, bias=True), nn.BatchNorm2d(7)), normal(5, 3, 6, 6)),
    "conv2d strided": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3, 2, 1), nn.BatchNorm2d(7)), normal(5, 3, 7, 7)),
    "conv2d same": (
        lambda: nn.Sequential(nn.Conv2d(3, 7, 3, padding="same", bias=False), nn.BatchNorm2d(7)),
        normal(5, 3, 6, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)),
        normal(5, 6, 6, 6),
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)), normal(5, 6, 6, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 7, 3, bias=False), nn.BatchNorm1d(7)), normal(5, 3, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 7, 2), nn.BatchNorm3d(7)), normal(5, 2, 4, 4, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)), normal(5, 6)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7)), normal(5, 6)),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, affine=False)), normal(5, 3, 6, 6)),
    "large epsilon": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7, eps=0.1)), normal(5, 3, 6, 6)),
}


@pytest.mark.parametrize("case", EXACT)
def test_folding_is_exact_and_gives_the_factors(case: str) -> None:
    build, x = EXACT[case]
    module, graph_module, factors = folded(build, x)
    assert norms(graph_module) == 0
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5
    norm = module.get_submodule("1")
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_var is not None
    gamma = norm.weight if norm.affine else torch.ones(1)
    expected = gamma / (norm.running_var + norm.eps).sqrt()
    assert norm.affine is False or bool((norm.weight < 0).any())  # the cases have negative scales
    assert set(factors) == {"0.weight"}
    assert torch.allclose(factors["0.weight"].factor, expected, rtol=1e-5)
    weight = graph_module.get_parameter("0.weight")
    shape = (-1, *[1] * (weight.ndim - 1))
    assert torch.allclose(weight, module.get_parameter("0.weight") * expected.reshape(shape), rtol=1e-5, atol=1e-7)


def test_channels_without_variance_or_scale_stay_finite() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    norm = disturbed(module)[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    norm.running_var[0] = 0
    with torch.no_grad():
        norm.weight[1] = 0
    x = normal(5, 3, 6, 6)
    graph_module = captured(module, Batch((x[:2],), {}, None))
    factors = fold_batch_norm(graph_module)
    assert float(factors["0.weight"].factor[1]) == 0
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5


class First(nn.Module):
    """BatchNorm before the convolution, and one behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu(self.convolution(self.first(x))))


class OneForTwo(nn.Module):
    """One convolution used twice, each time with its own BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.one = nn.BatchNorm2d(3)
        self.two = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.convolution(functional.relu(self.one(self.convolution(x)))))


class Overheard(nn.Module):
    """What the BatchNorm reads is read by something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.convolution(x)
        return inner + self.norm(inner)


class SharedBias(nn.Module):
    """The bias of the folded layer is read by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)) + self.convolution.bias[:, None, None]


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (First, 2),
        (OneForTwo, 2),
        (Overheard, 1),
        (SharedBias, 1),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1),
        (lambda: nn.BatchNorm2d(3), 1),
    ],
    ids=["no convolution before", "weight used twice", "two readers", "shared bias", "batch statistics", "alone"],
)
def test_what_cannot_be_folded_exactly_is_left_alone(build: Callable[[], nn.Module], left: int) -> None:
    x = normal(5, 3, 6, 6)
    module, graph_module, factors = folded(build, x)
    assert factors == {}
    assert norms(graph_module) == left
    with torch.no_grad():
        assert torch.allclose(graph_module(x), module(x), atol=1e-6)


class OwnWeights(nn.Module):
    """Weights that are not in layers, and a `bias` that is not theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.two = nn.Parameter(torch.randn(4, 6, 3, 3))
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.first = nn.BatchNorm2d(6)
        self.second = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(functional.conv2d(x, self.one)))
        return self.second(functional.conv2d(x, self.two)) + self.bias


def test_the_new_bias_overwrites_nothing() -> None:
    x = normal(5, 3, 8, 8)
    module, graph_module, factors = folded(OwnWeights, x)
    assert set(factors) == {"one", "two"}
    assert norms(graph_module) == 0
    with torch.no_grad():
        assert relative(graph_module(x), module(x)) < 1e-5


def test_folding_removes_what_nobody_reads_any_more() -> None:
    _, graph_module, _ = folded(*EXACT["conv2d"])
    left = {name for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]}
    assert left == {"0.weight", "0.bias"}
