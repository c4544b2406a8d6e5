"""Recipes as YAML: loading, saving, presets."""

from tersor.recipes.load import dump_recipe, load_recipe, parse_recipe, resolve, step_types
from tersor.recipes.presets import preset_names, preset_text

__all__ = [
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "preset_names",
    "preset_text",
    "resolve",
    "step_types",
]
