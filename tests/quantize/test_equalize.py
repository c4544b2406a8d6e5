"""Equalized nets compute the same, and even out what was uneven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from recovery_zoo import Learned, Parallel, Parts, folded, undone
from tersor.quantize.equalize import column_peaks, equalize
from zoo import Cnn, Depthwise, Mlp, normal, relative, seeded


class Chain(nn.Module):
    """Functions between two layers; `[B, 6, 8, 8]`."""

    def __init__(self, between: Callable[[Tensor], Tensor], first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.between(self.first(values)))


def convolutions(between: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Chain(between, nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1))


IMAGE = normal(3, 6, 8, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (Mlp, normal(5, 12), 2),
    "cnn": (Cnn, normal(3, 3, 8, 8), 0),  # the stem has two readers, the block ends in a sum
    "depthwise": (Depthwise, normal(3, 4, 8, 8), 1),  # ReLU6 stops the first pair, the mean the last
    "parallel": (Parallel, normal(3, 3, 8, 8), 0),
    "learned": (Learned, normal(5, 12), 0),
    **{f"parts in {size}d": (lambda size=size: Parts(size), normal(3, 4, *[8] * size), 3) for size in (1, 2, 3)},
    "relu": (convolutions(functional.relu), IMAGE, 1),
    "in place": (convolutions(lambda x: x.relu_()), IMAGE, 1),
    "leaky": (convolutions(lambda x: functional.leaky_relu(x, 0.2)), IMAGE, 1),
    "nothing": (convolutions(lambda x: x), IMAGE, 1),
    "pooled": (convolutions(lambda x: functional.avg_pool2d(functional.max_pool2d(x, 3, 1, 1), 2)), IMAGE, 1),
    "adaptive": (convolutions(lambda x: functional.adaptive_avg_pool2d(x, 2)), IMAGE, 1),
    "tokens": (lambda: Chain(functional.relu, nn.Linear(8, 8), nn.Linear(8, 8)), IMAGE, 1),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "relu6": convolutions(functional.relu6),
    "gelu": convolutions(functional.gelu),
    "a convolution before a linear layer": lambda: Chain(functional.relu, nn.Conv2d(6, 8, 1), nn.Linear(8, 8)),
    "a linear layer before a convolution": lambda: Chain(
        functional.relu, nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 8)), nn.Conv1d(8, 8, 1)
    ),
    "a pool over a linear layer's channels": lambda: Chain(
        lambda x: functional.max_pool2d(x, 3, 1, 1), nn.Linear(8, 8), nn.Linear(8, 8)
    ),
    "one pooled dimension of a linear layer": lambda: Chain(
        lambda x: functional.avg_pool1d(x.flatten(0, 1), 3, 1, 1), nn.Linear(8, 8), nn.Linear(8, 8)
    ),
    "padded with other values": convolutions(lambda x: functional.pad(x, (1, 1), value=1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_the_stored_weights_can_be_told(case: str) -> None:
    build, example, pairs = CASES[case]
    module = seeded(build)
    graph_module, units = folded(module, example)
    with torch.no_grad():
        expected = module(example.clone())
        assert equalize(graph_module, units) == pairs
        assert relative(graph_module(example.clone()), expected) < 1e-5
    assert len(units) >= pairs
    assert undone(graph_module, units, module) < 1e-5


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_homogeneous_or_mixes_channels_is_left_alone(case: str) -> None:
    module = seeded(OTHERS[case])
    graph_module, units = folded(module, IMAGE)
    assert equalize(graph_module, units) == 0
    assert units == {}
    assert torch.equal(graph_module(IMAGE), module(IMAGE))


def test_both_sides_of_every_pair_have_the_same_range() -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("first.weight")[:8] *= 100
    graph_module, units = folded(module, normal(5, 12))
    equalize(graph_module, units)
    linears = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.linear.default]
    for name, second in (("first", linears[1]), ("second", linears[2])):
        rows = graph_module.get_parameter(f"{name}.weight").flatten(1).abs().amax(1)
        assert torch.allclose(rows, column_peaks(graph_module, second), rtol=1e-2)


@given(
    scales=st.lists(st.floats(-3, 3), min_size=8, max_size=8),
    groups=st.sampled_from([1, 2, 4, 8]),
    leaking=st.floats(0, 1),
)
@settings(max_examples=10, deadline=None)
def test_any_channel_scales_and_groups(scales: list[float], groups: int, leaking: float) -> None:
    module = seeded(
        lambda: Chain(
            lambda x: functional.leaky_relu(x, leaking),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.Conv2d(8, 8, 3, groups=groups),
        )
    )
    with torch.no_grad():
        module.get_parameter("first.weight").mul_((10.0 ** torch.tensor(scales)).reshape(-1, 1, 1, 1))
        module.get_parameter("first.bias").mul_(10.0 ** torch.tensor(scales))
    graph_module, units = folded(module, IMAGE)
    assert equalize(graph_module, units) == 1
    with torch.no_grad():
        assert relative(graph_module(IMAGE), module(IMAGE)) < 1e-5
    assert undone(graph_module, units, module) < 1e-5


@pytest.mark.parametrize("dead", ["first", "second"])
def test_dead_channels_stay_finite(dead: str) -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        weight = module.get_parameter(f"{dead}.weight")
        weight[3] = 0
        weight[:, 2] = 0
        weight[4] = 1e-30
    graph_module, units = folded(module, normal(5, 12))
    equalize(graph_module, units)
    with torch.no_grad():
        assert relative(graph_module(normal(5, 12)), module(normal(5, 12))) < 1e-5
    assert all(bool(torch.isfinite(unit).all() & (unit > 0).all()) for unit in units.values())
    assert undone(graph_module, units, module) < 1e-5


def test_the_model_is_not_touched(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Mlp)
    before = noticed(module)
    graph_module, units = folded(module, normal(5, 12))
    equalize(graph_module, units)
    assert noticed(module) == before
