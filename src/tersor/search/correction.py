"""What trials teach: how much of a damage is left after training, and which damages were wrong.

Isotonic regression: Barlow et al. 1972; ridge regression: Hoerl and Kennard 1970,
https://doi.org/10.1080/00401706.1970.10488634.

Shapes: `T` trials, `G` groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.search.damage import DamageTable
from tersor.search.space import Space

LEAST_TRIALS = 3  # for a curve; a line needs one
RANGE = (0.25, 4.0)  # of what a damage is multiplied by

Array = np.ndarray[Any, np.dtype[np.float64]]


class DropModel:
    """The drop of the metric after training, from the damage before.

    Three trials or more: isotonic regression of the drop on `x = sign(damage) · log(1 + |damage|)`, with the original,
    which has neither, as one more trial; straight between trials, and beyond the largest damage along the line that
    follows. One or two: the line ``drop = a · x``, `a >= 0` by least squares. Without trials a drop is the damage.
    """

    def __init__(self) -> None:
        self.slope: float | None = None
        self.curve: tuple[Array, Array] | None = None

    def fit(self, predicted_damages: Sequence[float], drops: Sequence[float]) -> DropModel:
        """Learns from trials and returns itself; what was learned before is forgotten.

        Args:
            predicted_damages: `[T]`.
            drops: `[T]`, of the metric after training; negative where it rose.

        Raises:
            ConfigError: if there are not as many damages as drops, or one is not finite.
        """
        if len(predicted_damages) != len(drops):
            raise ConfigError(f"trials: expected a drop for each damage, got {len(predicted_damages)} and {len(drops)}")
        if not all(map(math.isfinite, (*predicted_damages, *drops))):
            raise ConfigError("trials: damages and drops must be finite; leave out trials that failed")
        x, y = _logarithm(np.array(predicted_damages, dtype=float)), np.array(drops, dtype=float)
        squares = float(x @ x)
        self.slope = max(0.0, float(x @ y) / squares) if squares > 0 else None
        self.curve = None
        if len(y) >= LEAST_TRIALS:
            places, back, counts = np.unique(np.append(x, 0.0), return_inverse=True, return_counts=True)
            means = np.bincount(back, np.append(y, 0.0)) / counts
            self.curve = places, isotonic_regression(means, weights=counts).x
        return self

    def predict(self, damage: float) -> float:
        """Drop of the metric after training; never less for more damage."""
        x = float(_logarithm(np.array(damage)))
        if self.curve is not None:
            places, drops = self.curve
            return float(np.interp(x, places, drops)) + (self.slope or 0.0) * max(0.0, x - float(places[-1]))
        return damage if self.slope is None else self.slope * x


def _logarithm(damages: Array) -> Array:
    found: Array = np.sign(damages) * np.log1p(np.abs(damages))
    return found


def adjust(damages: DamageTable, trials: Sequence[tuple[Choice, float]], space: Space) -> DamageTable:
    """The table with each group's damages multiplied by what trials say of it, between 0.25 and 4.

    The line of `DropModel`, ``drop = a · log(1 + damage)``, tells which damage each trial's drop stands for. Its ratio
    to the predicted damage, within the same range, is explained by the groups that the trial cut, each by its share
    `S [T, G]` of the predicted damage: ``min ‖S δ − (ratio − 1)‖² + λ ‖δ‖²``, with `λ` the mean square of the rows of
    `S`, and the multiplier `1 + δ`. Pairs follow the smaller one of their two groups. Groups that no trial has
    cut stay as they are.

    Args:
        damages: As they were measured.
        trials: Choices and drops of the metric after training.
        space: Of the model.

    Raises:
        ConfigError: if a drop is not finite, or a choice is not of the space.
    """
    predicted = np.array([damages.predict(space, choice) for choice, _ in trials])
    drops = np.array([drop for _, drop in trials], dtype=float)
    slope = DropModel().fit(predicted.tolist(), drops.tolist()).slope
    useful = predicted > 0
    if not slope or not useful.any():
        return damages
    rows = []
    for (choice, _), whole, use in zip(trials, predicted, useful, strict=True):
        if use:
            options = space.options(choice)
            inside = {group.name for group in space.groups if group.inside in choice.skipped}
            parts = [0.0 if g.name in inside else damages.of(g, options[g.name]) for g in space.groups]
            rows.append(np.array(parts) / whole)
    shares = np.array(rows)
    # exp overflows for drops far above the line; the range cuts them anyway
    meant = np.expm1(np.clip(drops[useful] / slope, 0.0, 100.0))
    ratios = np.clip(meant / predicted[useful], *RANGE)
    gram = shares @ shares.T
    penalty = float(np.trace(gram)) / len(gram)
    if penalty == 0:
        return damages
    factors = np.clip(1 + shares.T @ np.linalg.solve(gram + penalty * np.eye(len(gram)), ratios - 1), *RANGE)
    by_name = dict(zip((group.name for group in space.groups), factors.tolist(), strict=True))
    scaled = {
        name: {option: damage * by_name.get(name, 1.0) for option, damage in row.items()}
        for name, row in damages.damages.items()
    }
    pairs = {(one, other): extra * min(by_name[one], by_name[other]) for (one, other), extra in damages.pairs.items()}
    return DamageTable(damages.measure, scaled, pairs)
