"""The functions: the same work as the steps, on one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tersor
from tersor.distill import distances
from tersor.errors import ConfigError, NonFiniteError, UnsupportedError
from tersor.quantize import QuantizedModel
from tersor.train import Schedule
from zoo import CNN_DATA, MLP_DATA, TEXT_DATA, Cnn, Mlp, Scaling, Transformer, integers, relative, seeded, state_hash

CALLS: dict[str, Callable[[nn.Module, Any], QuantizedModel]] = {
    "static": tersor.quantize.static,
    "dynamic": tersor.quantize.dynamic,
    "weight_only": tersor.quantize.weight_only,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_model_answers_nearly_as_before_and_the_original_is_untouched(name: str) -> None:
    module = seeded(Mlp)
    before = state_hash(module)
    found = CALLS[name](module, MLP_DATA)
    assert state_hash(module) == before
    with torch.no_grad():
        error = relative(found.model(MLP_DATA), module(MLP_DATA))
    assert 0 < error < (0.15 if name == "weight_only" else 0.05)
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
    assert found.coverage == weights / sum(parameter.numel() for parameter in module.parameters())
    assert found.plan.mode == name
    assert found.notes


def test_settings_reach_the_step() -> None:
    module = seeded(Cnn)
    found = tersor.quantize.static(module, CNN_DATA, weight_bits=4, edge_bits=8, range_method="minmax")
    bits = {path: quant.scheme.bits for path, quant in found.plan.weights.items()}
    assert bits == {"stem.weight": 8, "block.0.weight": 4, "head.weight": 8}
    with pytest.raises(ConfigError, match="weight_bits"):
        tersor.quantize.static(module, CNN_DATA, weight_bits=9)


def test_tied_weights_count_once() -> None:
    module = seeded(Transformer)
    found = tersor.quantize.static(module, TEXT_DATA, output="logits")
    assert 0.8 < found.coverage < 1


def test_training_takes_a_loss_from_outside() -> None:
    module = seeded(Mlp)
    task = tersor.Task(train=(MLP_DATA, integers(4, 48)))
    found = tersor.quantize.qat(
        module, task, distillation=distances()["kd"], weight_bits=4, schedule=Schedule(epochs=1, batch_size=16)
    )
    assert found.plan.mode == "static"
    with torch.no_grad():
        assert relative(found.model(MLP_DATA), module(MLP_DATA)) < 0.5


@pytest.mark.parametrize("name", CALLS)
def test_bad_models_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="Scaling"):
        CALLS[name](seeded(Scaling), MLP_DATA)
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("first.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"first\.weight"):
        CALLS[name](module, MLP_DATA)
