"""The layers of a prepared graph: which there are, what they see, and biases of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recovery_zoo import PARTS_DATA, Learned, Parts, Ready, ready
from tersor.graph.fold import get_tensor
from tersor.graph.stream import Stream
from tersor.probe.columns import columns
from tersor.quantize.layers import bias_of, give_biases, layers, set_bias
from zoo import CNN_DATA, MLP_DATA, Cnn, Depthwise, Mlp, normal, relative


def modules_of(model: Ready) -> list[str]:
    return [layer.module for layer in layers(model.prepared)]


def test_the_layers_in_their_order() -> None:
    assert modules_of(ready(Cnn, CNN_DATA)) == ["stem", "block.0", "head"]
    assert modules_of(ready(Mlp, MLP_DATA)) == ["first", "second", "last"]
    assert modules_of(ready(Mlp, MLP_DATA, overrides={"second": 32})) == ["first", "last"]


def test_only_layers_with_a_weight_of_their_own_that_inputs_reach() -> None:
    model = ready(Learned, MLP_DATA)
    assert modules_of(model) == ["key", "head"]  # not: constant, called twice, computed bias
    assert len(model.prepared.placement.weights) == 5


class Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(functional.relu(self.first(features)))


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (Cnn, CNN_DATA),
        (Depthwise, normal(20, 4, 8, 8)),
        *((lambda size=size: Parts(size), PARTS_DATA[size]) for size in (1, 2, 3)),
        (Pointwise, normal(20, 5, 12)),
    ],
    ids=["cnn", "depthwise", "1d", "2d", "3d", "linear on tokens"],
)
def test_columns_times_the_weight_matrix_are_the_outputs(build: Callable[[], nn.Module], data: Tensor) -> None:
    model = ready(build, data, batch_size=4)
    stream = Stream(model.prepared.simulation, [(data[:3],)])
    found = layers(model.prepared)
    assert len(found) >= 2
    with torch.no_grad():
        for layer in found:
            (value,) = stream.advance(layer.source)
            rows = columns(value, layer.window, torch.Generator())  # [N, G, K]
            weight = model.prepared.quantizer(layer.quantizer)(get_tensor(model.prepared.simulation, layer.weight))
            parts = weight.flatten(1).chunk(rows.shape[1])
            outputs = torch.cat([rows[:, group] @ part.T for group, part in enumerate(parts)], dim=1)
            bias = bias_of(model.prepared, layer)
            outputs = outputs if bias is None else outputs + bias
            (expected,) = stream.advance(layer.node)
            assert relative(outputs, expected.movedim(layer.channel_dim, -1).reshape(outputs.shape)) < 1e-5


def test_every_layer_gets_a_bias_and_nothing_changes() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.without = nn.Conv2d(3, 8, 3, bias=False)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.bias = self.first.bias

        def forward(self, image: Tensor) -> Tensor:
            return self.second(functional.relu(self.first(functional.relu(self.without(image)))))

    model = ready(Sharing, CNN_DATA)
    before = model.outputs()
    assert [bias_of(model.prepared, layer) is None for layer in layers(model.prepared)] == [True, False, False]
    give_biases(model.prepared)
    assert torch.equal(model.outputs(), before)
    without, first, second = layers(model.prepared)
    assert torch.equal(bias_of(model.prepared, without), torch.zeros(8))  # type: ignore[arg-type]
    set_bias(model.prepared, first, torch.full((6,), 3.0))
    kept = bias_of(model.prepared, second)
    assert kept is not None
    assert torch.equal(kept, model.module.get_parameter("first.bias"))  # no longer shared
    give_biases(model.prepared)
    assert torch.equal(bias_of(model.prepared, first), torch.full((6,), 3.0))  # type: ignore[arg-type]


def test_a_norm_along_another_dimension_than_the_layers_channels_is_not_folded() -> None:
    model = ready(lambda: nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), normal(20, 5, 12))
    assert model.prepared.folded == {}
    assert relative(model.outputs(), model.expected()) < 0.05
