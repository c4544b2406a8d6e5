"""Losses on outputs in the one form that steps of other rooms take: `(outputs, teacher's outputs, temperature)`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tersor.core.context import Distance
from tersor.distill.losses import LOSSES, Kind, settings_of


def distances() -> Mapping[str, Distance]:
    """Every loss on outputs that needs no labels, by name; those without a temperature do not look at it."""
    return {
        name: _distance(kind, "temperature" in settings_of(name))
        for name, kind in LOSSES.items()
        if kind.on == "outputs" and not kind.needs_labels
    }


def _distance(kind: Kind, heated: bool) -> Distance:
    def distance(outputs: Tensor, expected: Tensor, temperature: float) -> Tensor:
        value: Tensor = kind.function(outputs, expected, **({"temperature": temperature} if heated else {}))
        return value

    return distance
