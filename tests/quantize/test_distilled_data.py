"""Inputs out of nothing, for which BatchNorm sees what it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.errors import UnsupportedError
from tersor.quantize.distilled_data import distilled_batches
from zoo import Cnn, Mlp, TwoInputs, normal, relative, seeded

EXAMPLE = Batch((torch.zeros(1, 3, 8, 8),), {}, None)


def distance(module: nn.Module, batches: list[Batch]) -> float:
    """How far the inputs of all BatchNorms are from their statistics, mean and deviation, relative."""
    found: list[float] = []

    def watch(norm: Any, args: tuple[Tensor, ...]) -> None:
        seen = args[0].movedim(1, 0).flatten(1)
        wanted = torch.cat([norm.running_mean, norm.running_var.sqrt()])
        found.append(relative(torch.cat([seen.mean(1), seen.std(1, correction=0)]), wanted))

    handles = [layer.register_forward_pre_hook(watch) for layer in module.modules() if hasattr(layer, "running_var")]
    with torch.no_grad():
        for batch in batches:
            batch.call(module)
    for handle in handles:
        handle.remove()
    return sum(found) / len(found)


def test_statistics_get_nearer_than_those_of_noise() -> None:
    module = seeded(Cnn)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        module.train()(3 * normal(64, 3, 8, 8, seed=5).cumsum(3) - 2)  # statistics of real data, unlike noise
    module.eval()
    made = distilled_batches(module, EXAMPLE, 24, batch_size=12, steps=100)
    noise = [Batch((normal(12, 3, 8, 8, seed=seed),), {}, None) for seed in range(2)]
    assert distance(module, made) < 0.3 * distance(module, noise)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 50), (1, 50), (5, 1), (4, 2)])
def test_as_many_as_were_asked_for(count: int, size: int) -> None:
    made = distilled_batches(seeded(Cnn), EXAMPLE, count, batch_size=size, steps=2)
    assert sum(map(len, made)) == count
    assert all(0 < len(batch) <= size for batch in made)
    values = torch.cat([batch.args[0] for batch in made])
    assert values.shape == (count, 3, 8, 8)
    assert bool(torch.isfinite(values).all())
    assert not values.requires_grad
    assert len(values.flatten(1).unique(dim=0)) == count  # no two alike


def test_the_seed_decides_and_the_model_stays(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn).train()
    before = noticed(module)
    one, two, other = (distilled_batches(module, EXAMPLE, 4, steps=3, seed=seed)[0].args[0] for seed in (1, 1, 2))
    assert noticed(module) == before
    assert module.training
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_inputs_by_keyword_come_by_keyword() -> None:
    module = seeded(Cnn)
    by_name = distilled_batches(module, Batch((), {"image": torch.zeros(1, 3, 8, 8)}, None), 3, steps=2)
    by_place = distilled_batches(module, EXAMPLE, 3, steps=2)
    assert list(by_name[0].kwargs) == ["image"]
    assert torch.equal(by_name[0].kwargs["image"], by_place[0].args[0])


class Constant(nn.Module):
    """BatchNorm behind a channel that is always zero, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.first.weight[1] = 0
            self.first.bias[1] = -1

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(functional.relu(self.first(image), inplace=True)).mean((2, 3))


def test_a_constant_channel_does_no_harm() -> None:
    (made,) = distilled_batches(seeded(Constant), EXAMPLE, 4, steps=10)
    assert bool(torch.isfinite(made.args[0]).all())


@pytest.mark.parametrize(
    ("build", "example", "message"),
    [
        (Mlp, Batch((torch.zeros(1, 12),), {}, None), "Mlp has 0 BatchNorms and 1 inputs"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), Batch((torch.zeros(1, 4),), {}, None), "0 BatchNorms"),
        (TwoInputs, Batch((torch.zeros(1, 1, 6, 6), torch.zeros(1, 6)), {}, None), "2 inputs"),
        (Cnn, Batch((torch.zeros(1, 3, 8, 8, dtype=torch.long),), {}, None), "a single float input"),
    ],
    ids=["no norm", "no statistics", "two inputs", "integers"],
)
def test_what_knows_nothing_of_its_data_is_refused(build: Any, example: Batch, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        distilled_batches(build(), example, 4, steps=1)
