"""Turns YAML into recipes and back.

A step's name resolves against what `prune`, `quantize` and `distill` export, and against the entry points in the
group `tersor.steps`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from tersor import distill, prune, quantize
from tersor.core.recipe import Recipe
from tersor.core.step import Step
from tersor.errors import ConfigError
from tersor.recipes.presets import preset_text


def step_types() -> dict[str, type[Step]]:
    """Every known step by the name that recipes use."""
    exported = [getattr(package, name) for package in (prune, quantize, distill) for name in package.__all__]
    exported += [point.load() for point in entry_points(group="tersor.steps")]
    return {item.name: item for item in exported if inspect.isclass(item) and issubclass(item, Step)}


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Reads a recipe from YAML text.

    Raises:
        ConfigError: for malformed YAML, unknown steps or settings, saying where.
        OrderError: if the steps stand in an impossible order.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or set(data) - {"name", "steps"} or not isinstance(data.get("steps"), list):
        raise ConfigError(f"{where}: expected a mapping with 'name' and a list 'steps', got {data!r}")
    steps = [_step(entry, f"{where}, step {position}") for position, entry in enumerate(data["steps"], start=1)]
    name = data.get("name", "custom")
    if not isinstance(name, str):
        raise ConfigError(f"{where}: 'name' must be text, got {name!r}")
    return Recipe(steps, name=name)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe from a YAML file."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"recipe file {file} does not exist")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text in UTF-8 ({error})") from None
    return parse_recipe(text, str(file))


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that `parse_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.as_data(), sort_keys=False)


def resolve(recipe: str | Path | Recipe, formats: frozenset[str]) -> Recipe:
    """A `Recipe` from a recipe, a preset's name, a YAML path, or `auto`.

    `auto` takes `int8` where the target runtime has such kernels (`formats`), and otherwise `convert`: nothing
    else that tersor has yet is known to make a model faster without training.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe == "auto":
        return parse_recipe(preset_text("int8" if "int8" in formats else "convert"))
    if isinstance(recipe, Path) or str(recipe).endswith((".yaml", ".yml")):
        return load_recipe(recipe)
    return parse_recipe(preset_text(str(recipe)), f"preset {recipe}")


def _step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{where}: expected one 'name: settings', got {entry!r}")
    ((name, settings),) = entry.items()
    known = step_types()
    if name not in known:
        raise ConfigError(f"{where}: expected a step of {sorted(known)}, got {name!r}")
    if settings is not None and not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise ConfigError(f"{where} ({name}): settings must be a mapping of names to values, got {settings!r}")
    try:
        return known[name](**(settings or {}))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
