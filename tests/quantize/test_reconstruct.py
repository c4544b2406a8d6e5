"""Learned rounding: no part gets worse, and the net comes nearer to float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recovery_zoo import PARTS_DATA, Learned, Parallel, Parts, Ready, ready
from tersor.core.target import Target
from tersor.graph import FakeQuantize
from tersor.graph.fold import get_tensor, set_parameter
from tersor.quantize.layers import layers
from tersor.quantize.reconstruct import Settings, Unit, _learning, _parts, mixed, reconstruct
from tersor.quantize.reference import float_reference
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Cnn,
    Mlp,
    Transformer,
    context_for,
    normal,
    quantized,
    relative,
    seeded,
    state_hash,
)

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (Cnn, CNN_DATA),
    "linear": (Mlp, MLP_DATA),
    "parallel": (Parallel, CNN_DATA),
    "grouped": (lambda: Parts(1), PARTS_DATA[1]),
    "learned": (Learned, MLP_DATA),
}


def made(case: str, **widths: Any) -> Ready:
    build, data = CASES[case]
    return ready(build, data, 12, **{"weight_bits": 3, "activation_bits": 4, "edge_bits": 3, **widths})


@pytest.mark.parametrize(("unit", "drop"), [("layer", 0.0), ("block", 0.0), ("block", 0.5)])
@pytest.mark.parametrize("case", CASES)
def test_the_net_comes_nearer_and_weights_are_rounded_up_or_down(case: str, unit: Unit, drop: float) -> None:
    plain, model = made(case), made(case)
    calls: list[tuple[int, int]] = []
    reconstruct(
        model.prepared, model.batches, Settings(unit, 50, drop), lambda done, total: calls.append((done, total))
    )
    assert calls == [(done + 1, calls[-1][1]) for done in range(len(calls))]
    assert calls[-1][0] == calls[-1][1]
    if unit == "layer":
        assert len(calls) == len(layers(model.prepared))
    expected = model.expected()
    slack = 1.05 if (case, unit) == ("parallel", "layer") else 1  # layers do not know of each other's errors
    assert relative(model.outputs(), expected) < slack * relative(plain.outputs(), expected)
    moved = 0
    for path, name in model.prepared.placement.weights.items():
        weight, quantizer = get_tensor(model.prepared.simulation, name), model.prepared.quantizer(path)
        assert torch.equal(quantizer.scale, plain.prepared.quantizer(path).scale)
        change = quantizer.codes(weight).int() - quantizer.codes(get_tensor(plain.prepared.simulation, name)).int()
        assert int(change.abs().max()) <= 1  # up or down, no further
        moved += int(change.abs().sum())
    assert moved


def test_the_modules_in_the_graph_are_quantizers_again() -> None:
    model = made("cnn")
    before = set(dict(model.prepared.simulation.named_modules()))
    reconstruct(model.prepared, model.batches, Settings(steps=2))
    assert set(dict(model.prepared.simulation.named_modules())) == before
    for path in (*model.prepared.placement.weights, *model.prepared.placement.activations):
        assert isinstance(model.prepared.simulation.get_submodule(path), FakeQuantize)
        assert bool((model.prepared.quantizer(path).scale > 0).all())
    assert not any(parameter.requires_grad for parameter in model.prepared.simulation.parameters())


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_no_part_gets_worse_however_badly_it_is_trained(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.quantize.reconstruct.LEARNING_RATE", 100.0)  # rounds at random
    model = made("linear")
    before = model.outputs()
    scales = {path: model.prepared.quantizer(path).scale.clone() for path in model.prepared.placement.activations}
    reconstruct(model.prepared, model.batches, Settings(unit, 5, 0))
    expected = model.expected()
    assert relative(model.outputs(), expected) <= relative(before, expected) + 1e-6
    if unit == "layer":
        assert all(torch.equal(model.prepared.quantizer(path).scale, scale) for path, scale in scales.items())


def test_blocks_learn_the_steps_of_their_activations_alone() -> None:
    model = made("cnn")
    scales = {name: model.prepared.quantizer(path).scale for path, name in model.prepared.placement.activations.items()}
    reconstruct(model.prepared, model.batches, Settings(steps=30, drop=0))
    now = {name: model.prepared.quantizer(path).scale for path, name in model.prepared.placement.activations.items()}
    changed = {name for name, scale in scales.items() if not torch.equal(scale, now[name])}
    assert changed == {"image", "relu", "conv2d_1"}  # what the last layer gets shares its scale with a view: it stays


class Concatenated(nn.Module):
    """All features share one scale, across the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 3)

    def forward(self, features: Tensor) -> Tensor:
        seen = torch.relu(self.first(features))
        return self.head(torch.cat([seen, torch.relu(self.second(seen))], 1))


def test_a_scale_that_parts_share_stays() -> None:
    prepared = ready(Concatenated, MLP_DATA, 12).prepared
    used = Counter(str(node.target) for node in prepared.simulation.graph.nodes if node.op == "call_module")
    shared = {path for path in prepared.placement.activations if used[path] > 1}
    assert len(shared) == 1
    parts = _parts(prepared, "block")
    assert any(str(node.target) in shared for part in parts for node in part.nodes)
    for part in parts:
        with _learning(prepared, part, 0, torch.Generator()) as (_, steps):
            assert not shared & set(steps)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_what_is_zero_stays_zero(unit: Unit) -> None:
    model, masks = made("cnn", weight_bits=2, edge_bits=2), {}
    for layer in layers(model.prepared):
        weight = get_tensor(model.prepared.simulation, layer.weight)
        masks[layer.weight] = weight.abs() > weight.abs().median()
        set_parameter(model.prepared.simulation, layer.weight, weight * masks[layer.weight])
    reconstruct(model.prepared, model.batches, Settings(unit, 60, 0))
    for path, kept in masks.items():
        assert not bool(get_tensor(model.prepared.simulation, path)[~kept].any())


def test_the_seed_decides_bit_for_bit_and_the_reference_stays() -> None:
    hashes = []
    for seed in (0, 0, 1):
        model = made("parallel")
        reference, _ = float_reference(model.prepared)
        before = reference(CNN_DATA[:4].clone())
        reconstruct(model.prepared, model.batches, Settings(steps=20, seed=seed))
        assert torch.equal(reference(CNN_DATA[:4].clone()), before)
        hashes.append(state_hash(model.prepared.simulation))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_callers_random_numbers_and_data_are_not_touched() -> None:
    model = made("parallel")
    before, data = torch.get_rng_state(), CNN_DATA.clone()
    reconstruct(model.prepared, model.batches, Settings(steps=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(CNN_DATA, data)


@pytest.mark.parametrize("rounding", ["adaround", "blocks"])
def test_texts_with_masks_are_learned_too(rounding: str) -> None:
    module = seeded(Transformer)
    context = context_for(
        module, TEXT_DATA, Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC), output="logits"
    )
    settings = {"weight_bits": 3, "overrides": {"embedding": 8}, "batch_size": 16}
    batch = context.task.splits["calibrate"].batch(range(48))
    with torch.no_grad():
        expected = batch.call(module)["logits"]
        plain = quantized(module, context, **settings).simulation(*batch.tensors().values())  # type: ignore[misc]
        done = quantized(module, context, **settings, rounding=rounding, steps=40).simulation
        assert done is not None
        assert relative(done(*batch.tensors().values()), expected) < relative(plain, expected)


def test_what_is_mixed() -> None:
    rounded, exact = torch.zeros(10_000), torch.ones(10_000)
    generator = torch.Generator().manual_seed(0)
    assert float(mixed(rounded, exact, 0.3, generator).mean()) == pytest.approx(0.3, abs=0.02)
    assert mixed(rounded, exact, 0, generator) is rounded
    codes = torch.zeros(3, dtype=torch.long)
    assert mixed(codes, torch.ones(3, dtype=torch.long), 0.5, generator) is codes
    assert mixed(7, 7, 0.5, generator) == 7  # type: ignore[arg-type]  # a size


def test_a_model_that_rounds_to_itself_is_left_alone() -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[1.0, -3, 2, 0], [3, 0, -1, 2]]))

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(features)

    model = ready(Exact, (normal(24, 4) * 5).round().clamp(-7, 8), 12, weight_bits=3, edge_bits=3, activation_bits=4)
    for path in model.prepared.placement.activations:
        model.prepared.quantizer(path).set_range(torch.tensor(-7.0), torch.tensor(8.0))
    before = state_hash(model.prepared.simulation)
    reconstruct(model.prepared, model.batches, Settings(steps=5))
    assert state_hash(model.prepared.simulation) == before
    assert relative(model.outputs(), model.expected()) < 1e-6
