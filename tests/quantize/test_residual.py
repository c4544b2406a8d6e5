from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.candidate import Candidate
from tersor.quantize.prepare import Prepared, prepare
from tersor.quantize.residual import spare_residuals
from tersor.quantize.widths import Widths
from zoo import CNN_DATA, MLP_DATA, Cnn, Mlp, context_for, normal, seeded

aten = torch.ops.aten
FOUR = Widths(weight_bits=4, activation_bits=4, edge_bits=4)


def spared(build: Callable[[], nn.Module], data: Any, bits: int = 8) -> Prepared:
    module = seeded(build)
    return spare_residuals(prepare(Candidate(module), context_for(module, data), "a test", FOUR), bits)


def reads(prepared: Prepared, target: object, position: int = 0) -> list[int]:
    """In how many bits an operator reads each of its inputs."""
    node = [node for node in prepared.simulation.graph.nodes if node.target is target][position]
    quantizers = [value for value in node.args if isinstance(value, fx.Node) and value.op == "call_module"]
    return [prepared.quantizer(str(value.target)).scheme.bits for value in quantizers]


def test_a_sum_reads_more_bits_than_the_layer_beside_it() -> None:
    prepared = spared(Cnn, CNN_DATA)
    assert reads(prepared, aten.conv2d.default, 1) == [4, 4]  # input and weight
    assert reads(prepared, aten.add.Tensor) == [8, 8]
    assert reads(prepared, aten.linear.default) == [4, 4]
    assert "activation_quantizers.relu_residual" in prepared.placement.activations
    names = list(prepared.placement.activations.values())
    assert len(names) == len(set(names))
    assert set(names) <= {node.name for node in prepared.simulation.graph.nodes}
    with torch.no_grad():
        assert torch.isfinite(prepared.simulation(CNN_DATA)).all()


@pytest.mark.parametrize(("build", "data", "bits"), [(Mlp, MLP_DATA, 8), (Cnn, CNN_DATA, 4)])
def test_where_nothing_else_reads_or_nothing_is_gained_all_stays(
    build: Callable[[], nn.Module], data: Any, bits: int
) -> None:
    module = seeded(build)
    plain = prepare(Candidate(module), context_for(module, data), "a test", FOUR)
    before = str(plain.simulation.graph)
    found = spare_residuals(plain, bits)
    assert found.placement == plain.placement
    assert str(found.simulation.graph) == before


class Shortcut(nn.Module):
    """The shortcut is sliced and padded before it is added, as in ResNets for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, 2)
        self.head = nn.Linear(6 * 9, 2)

    def forward(self, image: Tensor) -> Tensor:
        image = functional.relu(self.stem(image))
        short = functional.pad(image[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.head((self.layer(image) + short).flatten(1))


def test_a_shortcut_keeps_its_bits_on_its_whole_way() -> None:
    prepared = spared(Shortcut, normal(8, 3, 6, 6))
    assert reads(prepared, aten.conv2d.default, 1) == [4, 4]
    assert reads(prepared, aten.add.Tensor) == [8, 8]
    assert reads(prepared, aten.pad.default) == [8]
    assert reads(prepared, aten.linear.default) == [4, 4]
    flat = next(node for node in prepared.simulation.graph.nodes if node.target is aten.flatten.using_ints)
    assert prepared.quantizer(str(flat.args[0].target)).scheme.bits == 4  # on its way to a layer only
