from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.surgery import Surgery
from tersor.errors import ConfigError, CoverageError
from tersor.graph import apply_surgery
from tersor.prune.depth import depth


class Residual(nn.Module):
    def __init__(self, width: int, *, wrapped: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Any:
        answer = x + torch.relu(self.layer(x))
        return (answer,) if self.wrapped else answer


class Deep(nn.Module):
    def __init__(self, *, wrapped: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Residual(8, wrapped=wrapped) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            answer = block(x)
            x = answer[0] if isinstance(answer, tuple) else answer
        return self.head(x)


def built(*, wrapped: bool = False) -> Deep:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Deep(wrapped=wrapped).eval()


INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_of_the_blocks_go_and_the_rest_answers_as_before(wrapped: bool) -> None:
    model = built(wrapped=wrapped)
    before = copy.deepcopy(model.state_dict())
    report = depth(model, INPUTS, amount=0.5)
    assert len(report.removed) == 2
    assert report.params_after < report.params_before
    assert report.macs_after < report.macs_before
    expected = model.first(INPUTS)
    for index, block in enumerate(model.blocks):
        if f"blocks.{index}" not in report.removed:
            answer = block(expected)
            expected = answer[0] if wrapped else answer
    torch.testing.assert_close(report.model(INPUTS), model.head(expected))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_surgery_replays_on_a_new_model() -> None:
    report = depth(built(), INPUTS, blocks=["blocks.1"])
    replayed = apply_surgery(built(), Surgery.from_json(report.surgery.to_json()))
    replayed.load_state_dict(report.model.state_dict())
    torch.testing.assert_close(replayed(INPUTS), report.model(INPUTS), rtol=0, atol=0)


def test_similarity_takes_the_block_that_does_least() -> None:
    model = built()
    with torch.no_grad():
        model.blocks[2].layer.weight.mul_(1e-3)
        model.blocks[2].layer.bias.mul_(1e-3)
    assert list(depth(model, INPUTS, amount=0.25).removed) == ["blocks.2"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CoverageError):
        depth(nn.Linear(6, 3), INPUTS)


def test_a_wrong_amount_is_refused() -> None:
    with pytest.raises(ConfigError):
        depth(built(), INPUTS, amount=1.0)


@pytest.mark.parametrize("inplace", [False, True])
def test_data_gives_the_norms_that_stay_new_statistics(inplace: bool) -> None:
    class Normed(Residual):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.norm = nn.BatchNorm1d(width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.layer(x)).relu()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Normed(8), Normed(8), nn.Linear(8, 3)).train()
    report = depth(model, INPUTS, blocks=["1"], data=[INPUTS], inplace=inplace)
    assert "statistics of 1 BatchNorm layers re-estimated" in report.notes
    assert (report.model is model) is inplace
    assert all(module.training for module in report.model.modules())
    with torch.no_grad():
        mean = model[2].layer(model[0](INPUTS)).mean(0)
    torch.testing.assert_close(report.model[2].norm.running_mean, mean)  # type: ignore[index, union-attr]
    before = None if inplace else float(model[2].norm.running_mean.abs().sum())
    assert before in (None, 0.0)


def test_named_blocks_stand_in_the_models_order() -> None:
    assert depth(built(), INPUTS, blocks=["blocks.2", "blocks.0"]).removed == ("blocks.0", "blocks.2")
