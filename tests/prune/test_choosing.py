from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.graph import apply_surgery, plan_surgery
from tersor.probe import multiply_accumulates
from tersor.prune import choose_units, structured

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """A first stage of 256 pixels and a second of 4, of like weights: a channel of the first costs far more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.AvgPool2d(8),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Flatten(),
            nn.Linear(64, 5),
        ).eval()


def removed(**settings: object) -> dict[str, int]:
    chosen = choose_units(net(), IMAGES, allocation="global", target={"macs": 0.7}, **settings)
    return {name: len(units) for name, units in chosen.units.items()}


def test_a_score_over_its_cost_takes_the_units_that_save_most() -> None:
    by_score, by_cost = removed(normalise="none", reduction="sum"), removed(normalise="cost", reduction="sum")
    assert by_cost.get("4.weight[0]", 0) == 0
    assert by_score["4.weight[0]"] > 0
    assert sum(by_cost.values()) < sum(by_score.values())


def test_cost_is_what_the_target_counts() -> None:
    by_parameters = choose_units(
        net(), IMAGES, allocation="global", target={"parameters": 0.7}, normalise="cost", reduction="sum"
    )
    assert "4.weight[0]" in by_parameters.units


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_target_is_met_to_the_unit(share: float) -> None:
    model = net()
    report = structured(model, IMAGES, target={"macs": share}, allocation="global", normalise="cost", verify="off")
    whole = multiply_accumulates(model, (IMAGES,), {})
    assert report.macs_after <= share * whole
    largest = max(
        whole - multiply_accumulates(apply_surgery(net(), surgery), (IMAGES,), {})
        for surgery in [
            plan_surgery(model, report.coupling, {family.name: torch.tensor([0])})
            for family in report.coupling.families
        ]
    )
    assert share * whole - report.macs_after < largest  # one unit fewer would have been too few
