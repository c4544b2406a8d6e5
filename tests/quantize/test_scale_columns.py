from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.batch import Batch
from tersor.errors import CaptureError
from tersor.quantize.rounding import WeightGrid
from tersor.quantize.scale_columns import scaled_for_rounding
from tersor.quantize.widths import weight_scheme
from zoo import MLP_DATA, TEXT_DATA, Branching, Transformer, context_for, normal, relative, seeded, state_hash

WIDTH = 32


class PreNorm(nn.Module):
    """Two gated layers behind a LayerNorm some of whose channels are loud, and an output behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out_norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            self.norm.weight[::8] *= 30

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.norm(features)
        features = features + torch.tanh(self.gate(hidden)) * self.value(hidden)
        return self.out(self.out_norm(features))


DATA = normal(64, WIDTH)


def nearest(weight: Tensor) -> Tensor:
    return WeightGrid.fitted(weight, weight_scheme(3, 0, reduced=False), groups=4).nearest(weight)


def test_the_function_stays_and_rounding_costs_less() -> None:
    module = seeded(PreNorm)
    before = state_hash(module)
    context = context_for(module, DATA)
    scaled, places = scaled_for_rounding(module, context, lambda: [Batch((DATA,), {}, None)], nearest)
    assert places == 2
    assert state_hash(module) == before
    with torch.no_grad():
        assert relative(scaled(DATA), module(DATA)) < 1e-5
    assert not torch.equal(scaled.get_parameter("gate.weight"), module.get_parameter("gate.weight"))
    errors = {}
    for name, net in (("plain", module), ("scaled", scaled)):
        hidden = net.get_submodule("norm")(DATA).detach()
        weight = net.get_parameter("value.weight").detach()
        exact, rounded = functional.linear(hidden, weight), functional.linear(hidden, nearest(weight))
        errors[name] = relative(rounded, exact)
    assert errors["scaled"] < 0.8 * errors["plain"]


@pytest.mark.parametrize("method", ["nearest", "awq", "gptq", "hqq"])
def test_every_method_of_the_step_is_noted_and_none_is_worse_than_nearest_by_much(method: str) -> None:
    module = seeded(PreNorm)
    found = tersor.quantize.weight_only(module, DATA, bits=4, group_size=16, method=method)
    plain = tersor.quantize.weight_only(module, DATA, bits=4, group_size=16)
    with torch.no_grad():
        error, least = (relative(twin.model(DATA), module(DATA)) for twin in (found, plain))
    assert error <= 1.1 * least
    assert f"by {method}" in found.notes[0]
    assert ("columns scaled for their inputs at 2 places" in found.notes) == (method == "awq")


def test_tied_weights_are_left_alone() -> None:
    module = seeded(Transformer)
    context = context_for(module, TEXT_DATA, output="logits")
    batch = context.task.example(8)
    scaled, _ = scaled_for_rounding(module, context, lambda: [batch], nearest)
    assert torch.equal(scaled.get_parameter("embedding.weight"), module.get_parameter("embedding.weight"))
    assert scaled.get_submodule("head").weight is scaled.get_submodule("embedding").weight
    with torch.no_grad():
        assert relative(batch.call(scaled)["logits"], batch.call(module)["logits"]) < 1e-5


def test_what_cannot_be_traced_says_so() -> None:
    module = seeded(Branching)
    with pytest.raises(CaptureError, match="Branching"):
        tersor.quantize.weight_only(module, MLP_DATA, group_size=None, method="awq")
