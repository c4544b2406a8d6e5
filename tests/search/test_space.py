"""The search space of a model, and recipes that carry choices out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor import Candidate, Task
from tersor.core.candidate import frozen_copy
from tersor.core.context import Context
from tersor.core.target import Target
from tersor.errors import ConfigError
from tersor.measure import mac_counts
from tersor.recipes.load import dump_recipe, parse_recipe
from tersor.search.discover import discover, widths_of
from tersor.search.moves import literal, recipe_of, steps_of
from tersor.search.space import Space
from zoo import integers, normal, seeded

IMAGES, LABELS = normal(24, 3, 8, 8), integers(4, 24)
TASK = Task(train=(IMAGES, LABELS))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second, self.last = nn.Conv2d(32, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.last(self.second(torch.relu(self.norm(self.first(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Residual).eval()


@pytest.fixture(scope="module")
def space(model: nn.Module) -> Space:
    return discover(model, TASK, formats=("float32", "int8"))


def test_blocks_and_families_are_found(space: Space) -> None:
    blocks = [group.name for group in space.groups if group.kind == "block"]
    assert blocks == ["blocks.0", "blocks.1", "blocks.2"]
    families = {group.name: group for group in space.groups if group.kind != "block"}
    assert families["stem.weight[0]"].options == (16, 12, 8, 4)
    assert families["stem.weight[0]"].inside is None
    assert families["blocks.1.first.weight[0]"].inside == "blocks.1"
    assert "it is an output of the model" in " ".join(space.frozen)
    second = next(weight for weight in space.weights if weight.path == "blocks.1.second.weight")
    assert second.groups == ("blocks.1", "stem.weight[0]", "blocks.1.first.weight[0]")
    assert second.outputs == 16 * 64


@given(st.integers(2, 4096), st.sampled_from(["channel", "head", "hidden"]))
def test_widths_begin_with_all_and_fall(size: int, kind: str) -> None:
    widths = widths_of(size, kind)
    assert widths[0] == size
    assert list(widths) == sorted(set(widths), reverse=True)
    assert widths[-1] >= 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks.1": 0},
        {"stem.weight[0]": 8},
        {"blocks.0": 0, "stem.weight[0]": 4, "blocks.2.first.weight[0]": 16},
        {"blocks.0.first.weight[0]": 8, "blocks.1.first.weight[0]": 16},
    ],
)
def test_a_recipe_makes_the_sizes_that_the_space_tells(model: nn.Module, space: Space, options: dict[str, int]) -> None:
    choice = space.choice(options)
    candidate = Candidate(frozen_copy(model))
    context = Context(TASK, Target(), candidate.module)
    for step in steps_of(choice, space):
        candidate = step.apply(candidate, context)
    assert mac_counts(candidate.module, TASK.example(1))[""] == pytest.approx(space.macs(choice))
    entries = sum(p.numel() for p in candidate.module.parameters() if p.ndim > 1)
    assert entries == pytest.approx(space.entries(choice))


def test_recipes_are_written_and_read(space: Space) -> None:
    recipe = recipe_of(space.choice({"blocks.1": 0, "stem.weight[0]": 8}, "int8"), space)
    assert [step.name for step in recipe.steps] == ["prune.structured", "prune.depth", "quantize.static"]
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_what_is_in_skipped_blocks_is_not_decided(space: Space) -> None:
    choice = space.choice({"blocks.1": 0, "blocks.1.first.weight[0]": 8})
    assert choice == space.choice({"blocks.1": 0})
    assert space.options(choice)["blocks.1.first.weight[0]"] == 32


def test_keys_do_not_depend_on_the_order(space: Space) -> None:
    one = space.choice({"blocks.1": 0, "blocks.2": 0, "stem.weight[0]": 8})
    other = one.model_copy(update={"skipped": tuple(reversed(one.skipped))})
    assert one.key == other.key
    assert one.key != space.choice({"blocks.1": 0}).key


def test_kinds_limit_what_is_offered(model: nn.Module) -> None:
    found = discover(model, TASK, kinds=("block",))
    assert {group.kind for group in found.groups} == {"block"}
    assert all(not weight.rows and not weight.columns for weight in found.weights)


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"nowhere": 0}, "float32", "the space has no"),
        ({"blocks.1": 2}, "float32", "may stay, got 2"),
        ({}, "int3", "expected a format of"),
    ],
)
def test_choices_outside_the_space_are_refused(
    space: Space, options: dict[str, int], format: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        space.choice(options, format)


def test_family_names_are_no_patterns() -> None:
    from fnmatch import fnmatchcase

    assert fnmatchcase("conv.weight[0]", literal("conv.weight[0]"))
    assert not fnmatchcase("conv.weight0", literal("conv.weight[0]"))
