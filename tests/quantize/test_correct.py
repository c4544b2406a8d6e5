"""Corrected means are float's; corrected variances leave the codes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from recovery_zoo import PARTS_DATA, Learned, Parallel, Parts, Ready, ready
from tersor.core.batch import Batch
from tersor.errors import NonFiniteError
from tersor.graph.fold import get_tensor
from tersor.quantize.correct import Correction, correct
from tersor.quantize.reference import float_reference
from tersor.quantize.round_weights import round_weights
from zoo import CNN_DATA, MLP_DATA, Cnn, Mlp, relative

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (Cnn, CNN_DATA),
    "linear": (Mlp, MLP_DATA),
    "parallel": (Parallel, CNN_DATA),
    "grouped": (lambda: Parts(2), PARTS_DATA[2]),
    "learned": (Learned, MLP_DATA),
}


def made(case: str, **widths: Any) -> Ready:
    build, data = CASES[case]
    return ready(build, data, 20, weight_bits=3, activation_bits=4, edge_bits=3, **widths)


def means(values: Tensor) -> Tensor:
    return values.flatten(0, -2).mean(0)


def codes(model: Ready) -> dict[str, Tensor]:
    """The stored codes of all weights."""
    placed, simulation = model.prepared.placement.weights, model.prepared.simulation
    return {name: model.prepared.quantizer(path).codes(get_tensor(simulation, name)) for path, name in placed.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_last_layers_channels_have_floats_means(case: str) -> None:
    model = made(case)
    expected = means(model.expected())
    assert float((means(model.outputs()) - expected).abs().max()) > 1e-3
    before = codes(model)
    correct(model.prepared, model.batches, "mean")
    assert float((means(model.outputs()) - expected).abs().max()) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in codes(model).items())


@pytest.mark.parametrize("case", ["cnn", "linear", "grouped", "parallel"])
def test_means_and_variances_are_floats_and_the_codes_stay(case: str) -> None:
    model = made(case)
    before = codes(model)
    scales = {path: model.prepared.quantizer(path).scale for path in model.prepared.placement.weights}
    expected = model.expected()
    correct(model.prepared, model.batches, "mean_and_variance")
    found = model.outputs()
    assert float((means(found) - means(expected)).abs().max()) < 1e-4
    if expected.ndim == 2:
        assert torch.allclose(found.std(0), expected.std(0), rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in codes(model).items())
    assert any(not torch.equal(model.prepared.quantizer(path).scale, scale) for path, scale in scales.items())


def test_correction_helps_where_weights_are_coarse() -> None:
    plain, mean = made("cnn"), made("cnn")
    correct(mean.prepared, mean.batches, "mean")
    assert relative(mean.outputs(), mean.expected()) < relative(plain.outputs(), plain.expected())


def test_after_another_rounding_the_reference_is_the_float_model() -> None:
    model = made("cnn")
    reference = float_reference(model.prepared)
    round_weights(model.prepared, model.batches, "gptq")
    correct(model.prepared, model.batches, "mean", reference)
    assert float((means(model.outputs()) - means(model.expected())).abs().max()) < 1e-5


class Silent(nn.Module):
    """A channel that is always the same, and one that is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[0] = 0
            self.first.bias[1] = -1e3
            self.last.weight[2] = 0

    def forward(self, features: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(features)))


@pytest.mark.parametrize("what", get_args(Correction))
def test_constant_channels_do_no_harm(what: Correction) -> None:
    model = ready(Silent, MLP_DATA, weight_bits=3, edge_bits=3)
    correct(model.prepared, model.batches, what)
    assert bool(torch.isfinite(model.outputs()).all())
    assert torch.allclose(model.outputs()[:, 2], model.expected()[:, 2], atol=1e-6)
    assert all(bool((model.prepared.quantizer(path).scale > 0).all()) for path in model.prepared.placement.weights)


def test_the_reference_keeps_its_tensors_and_the_model_is_not_touched(noticed: Callable[[nn.Module], str]) -> None:
    model = made("cnn")
    before = noticed(model.module)
    reference, nodes = float_reference(model.prepared)
    inputs = CNN_DATA[:4]
    expected = model.module(inputs)
    assert torch.allclose(reference(inputs), expected, atol=1e-5)
    correct(model.prepared, model.batches, "mean_and_variance")
    assert torch.allclose(reference(inputs), expected, atol=1e-5)
    assert noticed(model.module) == before
    assert {node.name for node in reference.graph.nodes} == set(nodes)
    theirs = {id(tensor) for tensor in reference.parameters()}
    assert id(model.prepared.simulation.get_parameter("stem.weight")) not in theirs  # replaced, not changed


def test_nan_is_told_with_its_batch() -> None:
    model = made("linear")
    bad = MLP_DATA.clone()
    bad[25, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="calibration batch 1"):
        correct(model.prepared, lambda: [Batch((part,), {}, None) for part in bad.split(20)], "mean")
