"""Turns a choice into the recipe that carries it out: cut, train, quantize.

The winner of a search is therefore a recipe that can be read, changed and run again without the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from tersor.core.recipe import Recipe
from tersor.core.search import Choice
from tersor.core.step import Step
from tersor.distill import Recover
from tersor.errors import ConfigError
from tersor.prune import DepthStep, Structured
from tersor.quantize import Dynamic, Half, Static, WeightOnly
from tersor.search.space import Space

FORMATS: Mapping[str, tuple[Step, ...]] = MappingProxyType(
    {
        "float32": (),
        "float16": (Half(),),
        "int8": (Static(range_method="mse"),),
        "int8-dynamic": (Dynamic(),),
        "int4-weights": (WeightOnly(),),
    }
)


def steps_of(choice: Choice, space: Space, trainings: Sequence[Recover] = (), *, criterion: str = "l2") -> list[Step]:
    """The steps of a choice: families shrink, blocks go, each training in turn, numbers are rounded.

    Units go before blocks, because both are named after the whole model.

    Args:
        choice: Of `space`.
        space: Sizes of the families.
        trainings: What is trained after cutting; left out where nothing was cut.
        criterion: Which units of a family go; see `tersor.prune.criteria`.

    Raises:
        ConfigError: for a format that no recipe here makes, or a family that the space does not have.
    """
    unknown = sorted({*choice.widths, *choice.skipped} - set(space.by_name))
    if unknown:
        raise ConfigError(f"choice: the space has no {unknown}")
    steps: list[Step] = []
    shares = {literal(name): 1 - kept / space.by_name[name].options[0] for name, kept in sorted(choice.widths.items())}
    if shares:
        steps.append(Structured(allocation=shares, criterion=criterion, floor=0.0, verify="together"))
    if choice.skipped:
        steps.append(DepthStep(blocks=tuple(choice.skipped)))
    if steps:
        steps.extend(trainings)
    return [*steps, *finish(choice.format)]


def recipe_of(choice: Choice, space: Space, trainings: Sequence[Recover] = (), *, criterion: str = "l2") -> Recipe:
    """`steps_of` as a recipe."""
    return Recipe(steps_of(choice, space, trainings, criterion=criterion), name=f"search-{choice.key}")


def finish(format: str) -> tuple[Step, ...]:
    """Steps that bring a float model to a number format.

    Raises:
        ConfigError: if there is no such format.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {list(FORMATS)}, got {format!r}")
    return FORMATS[format]


def literal(name: str) -> str:
    """A glob pattern that matches this name alone: families are called `conv.weight[0]`."""
    return name.replace("[", "[[]")
