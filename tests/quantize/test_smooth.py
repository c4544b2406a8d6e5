"""Smoothed nets compute the same, and their activations lose outliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from recovery_zoo import folded, undone
from tersor.core.batch import Batch
from tersor.graph.stream import Stream
from tersor.quantize.smooth import smooth
from zoo import normal, relative, seeded

WIDTH = 8
TOKENS = normal(6, 5, WIDTH) * torch.tensor([1.0, 1, 30, 1, 0.1, 1, 1, 5])


class WrittenOut(nn.Module):
    """An RMSNorm as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """A norm before two layers, and a layer before another."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = norm()
        self.left, self.right = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.up, self.down = nn.Linear(12, 16, bias=False), nn.Linear(16, WIDTH)
        with torch.no_grad():
            for name, parameter in self.norm.named_parameters():
                parameter[..., 2] *= 40
                parameter[..., 5] *= -1 if name == "weight" else 1

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.norm(tokens)
        inner = functional.gelu(self.left(seen)) * self.right(seen)
        return tokens + self.down(functional.relu(self.up(inner)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "without shift": lambda: nn.LayerNorm(WIDTH, bias=False),
    "over tokens too": lambda: nn.LayerNorm((5, WIDTH)),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "rms norm written out": WrittenOut,
}


def batches(values: Tensor = TOKENS) -> list[Batch]:
    return [Batch((part,), {}, None) for part in values.split(4)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_the_function_stays_and_the_stored_weights_can_be_told(norm: str, alpha: float) -> None:
    module = seeded(lambda: Block(NORMS[norm]))
    graph_module, units = folded(module, TOKENS)
    assert smooth(graph_module, units, batches, alpha) == 2
    with torch.no_grad():
        assert relative(graph_module(TOKENS), module(TOKENS)) < 1e-5
    assert set(units) == {f"{name}.weight" for name in ("left", "right", "up", "down")}
    assert undone(graph_module, units, module) < 1e-5


def peaks_before(graph_module: fx.GraphModule, weight: str) -> Tensor:
    """Largest input of each channel of a linear layer, `[C]`."""
    layer = next(
        node
        for node in graph_module.graph.nodes
        if node.target is torch.ops.aten.linear.default and node.args[1].target == weight
    )
    with torch.no_grad():
        (values,) = Stream(graph_module, [(TOKENS,)]).advance(layer.args[0])
    return values.flatten(0, -2).abs().amax(0)


@pytest.mark.parametrize("weight", ["left.weight", "down.weight"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_shares_the_trouble(weight: str, alpha: float) -> None:
    module = seeded(lambda: Block(NORMS["layer norm"]))
    graph_module, units = folded(module, TOKENS)
    readers = ["left.weight", "right.weight"] if weight == "left.weight" else [weight]

    def columns() -> Tensor:
        return torch.stack([graph_module.get_parameter(name).abs().amax(0) for name in readers]).amax(0)

    before, heavy = peaks_before(graph_module, weight), columns()
    smooth(graph_module, units, batches, alpha)
    factor = before**alpha / heavy ** (1 - alpha)
    factor = torch.where(torch.isfinite(factor) & (factor > 1e-4), factor, 1.0)  # channels that ReLU silences
    assert torch.allclose(peaks_before(graph_module, weight), before / factor, rtol=1e-4)
    assert torch.allclose(columns(), heavy * factor, rtol=1e-4)


def test_outliers_shrink() -> None:
    graph_module, units = folded(seeded(lambda: Block(NORMS["layer norm"])), TOKENS)
    before = peaks_before(graph_module, "left.weight")
    smooth(graph_module, units, batches, 0.5)
    after = peaks_before(graph_module, "left.weight")
    assert before.max() / before.median() > 5
    assert after.max() / after.median() < 0.5 * before.max() / before.median()


class Chained(nn.Module):
    """Each layer reads the one before and gives to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def test_what_is_seen_behind_a_smoothed_layer_is_what_it_gives() -> None:
    module = seeded(Chained)
    graph_module, units = folded(module, TOKENS)
    before = {path: peaks_before(graph_module, path) for path in ("layers.2.weight", "layers.4.weight")}
    assert smooth(graph_module, units, batches, 1.0) == 3
    for path, peaks in before.items():
        after = peaks_before(graph_module, path)
        assert torch.allclose(after[peaks > 1e-3], torch.ones(int((peaks > 1e-3).sum())), rtol=1e-4)
    assert relative(graph_module(TOKENS).detach(), module(TOKENS).detach()) < 1e-5


@given(scales=st.lists(st.floats(-4, 4), min_size=WIDTH, max_size=WIDTH), alpha=st.floats(0, 1))
@settings(max_examples=8, deadline=None)
def test_any_scales(scales: list[float], alpha: float) -> None:
    module = seeded(Chained)
    values = TOKENS * 10.0 ** torch.tensor(scales)
    graph_module, units = folded(module, values)
    smooth(graph_module, units, lambda: batches(values), alpha)
    with torch.no_grad():
        assert relative(graph_module(values), module(values)) < 1e-5
    assert undone(graph_module, units, module) < 1e-5


class Elsewhere(nn.Module):
    """What the norm gives is read by something else too, or has no scale, or is shared."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=kind != "no scale")
        self.other = nn.LayerNorm(WIDTH)
        if kind == "shared":
            self.other.weight, self.other.bias = self.norm.weight, self.norm.bias
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor) -> Any:
        seen = self.norm(tokens)
        if self.kind == "read":
            return self.layer(seen) + seen.sum(-1, keepdim=True)
        return self.layer(seen) + self.other(tokens)[..., :4]


@pytest.mark.parametrize("kind", ["read", "no scale", "shared"])
def test_where_it_would_cost_something_nothing_happens(kind: str) -> None:
    module = seeded(lambda: Elsewhere(kind))
    graph_module, units = folded(module, TOKENS)
    assert smooth(graph_module, units, batches, 0.5) == 0
    assert torch.equal(graph_module(TOKENS), module(TOKENS))


def test_what_no_input_reaches_is_left_alone() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.scale = nn.Parameter(torch.rand(3, WIDTH)), nn.Parameter(torch.rand(WIDTH))
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens @ self.layer(self.queries * self.scale).T

    module = seeded(Constant)
    graph_module, units = folded(module, TOKENS)
    assert smooth(graph_module, units, batches, 0.5) == 0
    assert torch.equal(graph_module(TOKENS), module(TOKENS))


def test_silent_channels_stay_finite() -> None:
    values = TOKENS.clone()
    values[..., 3] = 0
    module = seeded(Chained)
    with torch.no_grad():
        module.get_parameter("layers.0.bias")[1] = -1e4
        module.get_parameter("layers.2.weight")[:, 4] = 0
    graph_module, units = folded(module, values)
    smooth(graph_module, units, lambda: batches(values), 0.5)
    assert relative(graph_module(values).detach(), module(values).detach()) < 1e-5
    assert all(bool(torch.isfinite(unit).all() & (unit > 0).all()) for unit in units.values())
