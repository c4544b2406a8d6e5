"""Rounding by what the layers see: nearer outputs, points of the grid, and zeros that stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recovery_zoo import PARTS_DATA, Learned, Parallel, Parts, Ready, ready
from tersor.core.batch import Batch
from tersor.errors import NonFiniteError
from tersor.graph.fold import get_tensor, set_parameter
from tersor.quantize.layers import Layer, layers
from tersor.quantize.round_weights import METHODS, SecondOrder, round_weights
from zoo import CNN_DATA, MLP_DATA, Cnn, Mlp, normal, relative, state_hash

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (Cnn, CNN_DATA),
    "linear": (Mlp, MLP_DATA),
    "parallel": (Parallel, CNN_DATA),
    "1d": (lambda: Parts(1), PARTS_DATA[1]),
    "3d": (lambda: Parts(3), PARTS_DATA[3]),
}


def made(case: str) -> Ready:
    build, data = CASES[case]
    common = normal(len(data), *[1] * (data.ndim - 1), seed=9)  # with inputs that are not alike nothing can be repaired
    return ready(build, data + 2 * common, 20, weight_bits=3, edge_bits=3)


def output_of(model: Ready, layer: Layer) -> Tensor:
    """What one layer gives for its input in the simulation, as it is rounded now."""
    kept: list[Tensor] = []
    node = layer.node
    with torch.no_grad():
        for batch in model.batches():

            class Keeping(torch.fx.Interpreter):
                def run_node(self, n: torch.fx.Node) -> object:
                    found = super().run_node(n)
                    if n is node:
                        kept.append(found.clone())
                    return found

            Keeping(model.prepared.simulation).run(*batch.tensors().values())
    return torch.cat(kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_on_its_grid_and_the_net_nearer_to_float(case: str, method: SecondOrder) -> None:
    plain, model = made(case), made(case)
    round_weights(model.prepared, model.batches, method)
    assert len(layers(model.prepared)) == len(model.prepared.placement.weights)
    for layer in layers(model.prepared):
        weight = get_tensor(model.prepared.simulation, layer.weight)
        assert torch.allclose(model.prepared.quantizer(layer.quantizer)(weight), weight, atol=1e-6)
    expected = model.expected()
    assert relative(model.outputs(), expected) < relative(plain.outputs(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_layers_output_errs_less(method: SecondOrder) -> None:
    plain, model = made("cnn"), made("cnn")
    (first, *_), (same, *_) = layers(model.prepared), layers(plain.prepared)
    exact = made("cnn")
    exact.prepared.quantizer(layers(exact.prepared)[0].quantizer).enabled = False
    expected = output_of(exact, layers(exact.prepared)[0])
    round_weights(model.prepared, model.batches, method)
    assert relative(output_of(model, first), expected) < 0.9 * relative(output_of(plain, same), expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_zero_stays_zero(method: SecondOrder) -> None:
    model, masks = made("cnn"), {}
    for layer in layers(model.prepared):
        weight = get_tensor(model.prepared.simulation, layer.weight)
        masks[layer.weight] = weight.abs() > weight.abs().median()
        set_parameter(model.prepared.simulation, layer.weight, weight * masks[layer.weight])
    before = model.outputs()
    round_weights(model.prepared, model.batches, method)
    for path, kept in masks.items():
        weight = get_tensor(model.prepared.simulation, path)
        assert not bool(weight[~kept].any())
        assert bool(weight[kept].any())
    assert not torch.equal(model.outputs(), before)


def test_only_layers_of_their_own_are_touched() -> None:
    model = ready(Learned, MLP_DATA, weight_bits=3, edge_bits=3)
    before = {path: get_tensor(model.prepared.simulation, path).clone() for path in ("query.weight", "twice.weight")}
    round_weights(model.prepared, model.batches, "gptq")
    for path, weight in before.items():
        assert torch.equal(get_tensor(model.prepared.simulation, path), weight)


def test_the_same_bits_every_time() -> None:
    hashes = set()
    for _ in range(2):
        model = ready(lambda: Parts(2), normal(4, 4, 96, 96), weight_bits=3)  # enough positions for a sample
        round_weights(model.prepared, model.batches, "gptq")
        hashes.add(state_hash(model.prepared.simulation))
    assert len(hashes) == 1


def test_nan_is_told_with_batch_and_layer() -> None:
    model = made("linear")
    bad = MLP_DATA.clone()
    bad[45, 3] = float("inf")
    model.prepared.quantizer(next(iter(model.prepared.placement.activations))).enabled = False
    with pytest.raises(NonFiniteError, match=r"calibration batch 2: NaN or Inf flows into layer 'first'"):
        round_weights(model.prepared, lambda: [Batch((part,), {}, None) for part in bad.split(20)], "gptq")
