"""The recipes that come with tersor, one YAML file each."""

from __future__ import annotations

from importlib.resources import files

from tersor.errors import ConfigError


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """A preset's YAML.

    Raises:
        ConfigError: naming those that exist.
    """
    if name not in preset_names():
        raise ConfigError(f"recipe: expected a preset of {preset_names()} or a path to a YAML file, got {name!r}")
    return (files(__name__) / f"{name}.yaml").read_text()
