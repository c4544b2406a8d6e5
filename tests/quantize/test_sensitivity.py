"""What one rounded layer costs, against models rounded by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.candidate import Candidate
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.quantize import sensitivity
from tersor.quantize.sensitivity import Sensitivity
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    TWO_DATA,
    Cnn,
    Mlp,
    Transformer,
    TwoInputs,
    integers,
    normal,
    seeded,
)

TARGET = Target(threads=1, reduce_range=False)
LABELS = integers(4, 48)


class InPlace(nn.Module):
    """Changes values where they are, and asks for a view that channels-last kernels would break."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 5)
        self.inplace = inplace

    def forward(self, image: Tensor) -> Tensor:
        hidden = functional.relu(self.first(image), inplace=self.inplace)
        seen = functional.relu(hidden + self.second(hidden), inplace=self.inplace)
        flat = seen.view(seen.shape[0], -1) if self.inplace else seen.flatten(1)
        return self.head(flat)


class Regression(nn.Module):
    """Two numbers in, two out, no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


def rounded(module: nn.Module, path: str) -> nn.Module:
    """A copy whose weight at `path` has 8 bits, symmetric, one scale per row."""
    result = copy.deepcopy(module)
    weight = result.get_submodule(path).get_parameter("weight")
    with torch.no_grad():
        scale = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
        weight.copy_((weight / scale).round() * scale)
    return result


def kl(module: nn.Module, changed: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        before, after = (part(data).double().log_softmax(-1) for part in (module, changed))
    return float((before.exp() * (before - after)).sum(-1).mean())


def by_layer(found: Sensitivity, bits: int) -> dict[str, float]:
    return {row.layer: row.loss[bits] for row in found.rows}


def test_the_output_measure_is_the_divergence_of_a_model_rounded_by_hand() -> None:
    module = seeded(Mlp)
    found = sensitivity(module, Task(calibrate=(MLP_DATA, LABELS)), target=TARGET, bits=(8, 4))
    assert [row.layer for row in found.rows] == ["first", "second", "last"]
    assert found.bits == (4, 8)
    assert found.unit == "KL divergence"
    assert found.samples == 48
    for row in found.rows:
        assert row.loss[8] == pytest.approx(kl(module, rounded(module, row.layer), MLP_DATA), rel=0.05, abs=1e-9)
        assert row.loss[4] > row.loss[8] > 0
        assert set(row.drop) == {4, 8}
    assert [(row.kind, row.parameters, row.scales, row.macs) for row in found.rows] == [
        ("Linear", 192, 16, 192), ("Linear", 256, 16, 256), ("Linear", 64, 4, 64),
    ]  # fmt: skip
    assert [row.edge for row in found.rows] == [True, False, True]


def test_the_drop_is_that_of_the_metric() -> None:
    module = seeded(TwoInputs)
    with torch.no_grad():
        labels = module(**TWO_DATA).argmax(1)
        right = float((rounded(module, "head")(**TWO_DATA).argmax(1) == labels).double().mean())
    found = sensitivity(module, Task(calibrate={**TWO_DATA, "labels": labels}), target=TARGET, bits=(2, 8))
    drops = {row.layer: row.drop for row in found.rows}
    assert drops["head"][8] == pytest.approx(1 - right)
    assert max(drop[2] for drop in drops.values()) > 0


def test_folded_norms_count_and_the_model_stays(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn)
    before = noticed(module)
    found = sensitivity(module, CNN_DATA, target=TARGET, samples=20)
    assert noticed(module) == before
    assert {row.layer: row.macs for row in found.rows} == {"stem": 13824, "block.0": 36864, "head": 640}
    assert found.samples == 20
    assert by_layer(found, 8)["head"] == pytest.approx(kl(module, rounded(module, "head"), CNN_DATA[:20]), rel=0.05)
    again = sensitivity(Candidate(module), CNN_DATA, target=TARGET, samples=20)
    assert by_layer(again, 4) == by_layer(found, 4)


def test_operators_that_work_in_place_spoil_nothing() -> None:
    module, plain = seeded(InPlace), seeded(lambda: InPlace(inplace=False))
    plain.load_state_dict(module.state_dict())
    found, expected = (sensitivity(part, CNN_DATA, target=TARGET) for part in (module, plain))
    for bits in (2, 4):
        assert by_layer(found, bits) == pytest.approx(by_layer(expected, bits), rel=1e-3)


def test_fisher_is_half_the_sum_of_squared_gradients_times_squared_errors() -> None:
    module = seeded(Mlp)
    found = sensitivity(module, Task(calibrate=(MLP_DATA, LABELS)), target=TARGET, measure="fisher", bits=(8,))
    squares = {row.layer: torch.zeros_like(module.get_parameter(f"{row.layer}.weight")) for row in found.rows}
    for image, label in zip(MLP_DATA, LABELS, strict=True):
        loss = functional.cross_entropy(module(image[None]), label[None])
        weights = [module.get_parameter(f"{layer}.weight") for layer in squares]
        for layer, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            squares[layer] += gradient.square() / len(MLP_DATA)
    for layer, squared in squares.items():
        error = rounded(module, layer).get_parameter(f"{layer}.weight") - module.get_parameter(f"{layer}.weight")
        expected = 0.5 * float((squared * error.detach().square()).sum())
        assert by_layer(found, 8)[layer] == pytest.approx(expected, rel=1e-3)
    assert not any(row.drop for row in found.rows)


def test_fisher_foresees_the_divergence_of_small_errors() -> None:
    module = seeded(Cnn)
    data = normal(400, 3, 8, 8)
    measured, foreseen = (
        by_layer(sensitivity(module, data, target=TARGET, bits=(6,), samples=400, measure=measure), 6)
        for measure in ("output", "fisher")
    )
    assert all(0.25 < foreseen[layer] / measured[layer] < 4 for layer in measured)
    assert max(foreseen, key=foreseen.__getitem__) == max(measured, key=measured.__getitem__) == "head"


def test_outputs_without_classes_are_compared_by_their_squares() -> None:
    module, targets = seeded(Regression), normal(48, 3, seed=3)
    task = Task(calibrate=(MLP_DATA, targets), metric=lambda outputs, labels: -float((outputs - labels).abs().mean()))
    found = sensitivity(module, task, target=TARGET, bits=(8,))
    with torch.no_grad():
        before, after = module(MLP_DATA), rounded(module, "layer")(MLP_DATA)
    assert found.unit == "relative squared error"
    assert by_layer(found, 8)["layer"] == pytest.approx(float(((after - before).norm() / before.norm()) ** 2), rel=0.05)
    assert not found.rows[0].drop  # the function wants whole outputs


def test_inputs_are_rounded_if_asked_for_and_only_those_of_the_layer() -> None:
    module = seeded(Mlp)
    alone = by_layer(sensitivity(module, MLP_DATA, target=TARGET, bits=(8,)), 8)
    both = by_layer(sensitivity(module, MLP_DATA, target=TARGET, bits=(8,), activation_bits=3), 8)
    assert all(both[layer] > 10 * alone[layer] for layer in alone)


def test_shared_weights_are_one_layer_and_tables_keep_their_width() -> None:
    target = Target(threads=1, reduce_range=False, dynamic=TEXT_DYNAMIC)
    found = sensitivity(seeded(Transformer), Task(calibrate=TEXT_DATA, output="logits"), target=target)
    rows = {row.layer: row for row in found.rows}
    assert rows["embedding"].modules == ("embedding", "head")
    assert rows["embedding"].table
    assert set(rows["embedding"].loss) == {8}
    assert "head" not in rows
    assert set(rows["wide"].loss) == {2, 4, 8}


def test_targets_with_seven_bits_lose_more() -> None:
    module = seeded(Mlp)
    full, reduced = (
        by_layer(sensitivity(module, MLP_DATA, target=Target(threads=1, reduce_range=reduce), bits=(8,)), 8)
        for reduce in (False, True)
    )
    assert all(reduced[layer] > full[layer] for layer in full)


def test_it_prints_the_most_sensitive_layer_first() -> None:
    found = sensitivity(seeded(Cnn), CNN_DATA, target=TARGET)
    first = found.ranked()[0]
    assert first.loss[2] == max(row.loss[2] for row in found.rows)
    lines = str(found).splitlines()[4:-1]
    assert [line.split()[0] for line in lines] == [row.layer for row in found.ranked()]
    data = found.as_data()
    assert [row["layer"] for row in data["layers"]] == [row.layer for row in found.ranked()]
    assert data["layers"][0]["loss"]["2"] == first.loss[2]
    assert first.size_bytes(4) == -(-4 * first.parameters // 8) + 4 * first.scales
    assert first.size_bytes(32) == 4 * first.parameters
    assert first.loss_at(32) == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": ()}, "bits: expected widths of 2 to 8"),
        ({"bits": (1, 4)}, "bits: expected widths of 2 to 8"),
        ({"measure": "guess"}, r"measure: expected one of \['output', 'fisher'\], got 'guess'"),
        ({"samples": 0}, "samples: expected at least 1"),
        ({"measure": "fisher", "activation_bits": 8}, "fisher.*is about weights"),
    ],
)
def test_what_does_not_exist_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sensitivity(seeded(Mlp), MLP_DATA, target=TARGET, **fields)


def test_fisher_needs_something_to_be_wrong_about() -> None:
    class OneNumber(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 1)

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(features)

    with pytest.raises(DataError, match="needs labels, or outputs that are scores of classes"):
        sensitivity(seeded(OneNumber), MLP_DATA, target=TARGET, measure="fisher")


def test_answers_that_are_not_finite_in_float_are_an_error() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(features).log()

    with pytest.raises(NonFiniteError, match="calibration batch 0: the model's output has NaN or Inf"):
        sensitivity(seeded(Logarithm), MLP_DATA, target=TARGET)


def test_infinite_losses_sort_first() -> None:
    found = sensitivity(seeded(Mlp), MLP_DATA, target=TARGET, bits=(8,))
    rows = list(found.rows)
    rows[1] = type(rows[1])(**{**vars(rows[1]), "loss": {8: math.inf}})
    assert Sensitivity(tuple(rows), (8,), "output", "KL divergence", 1, 0.0).ranked()[0].layer == "second"
