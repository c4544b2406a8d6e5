"""Cost tables: what a model costs on the target once some of it is gone, fitted on whole models that were measured.

    latency = constant + Σ_weights a_kind + b_kind · macs · rows · columns + c_kind · outputs · rows

over the weights whose block stays; `rows` and `columns` are the shares of a weight that stay. Layers that are timed
alone do not add up to the model that they are in: runtimes fuse them and keep data in caches. So whole models are
measured, and what a kind of weight costs is found by non-negative least squares on the relative errors (Lawson and
Hanson 1974, https://doi.org/10.1137/1.9781611971217). No coefficient is negative, so with less to do a model is never
predicted slower.

Shapes: `P` points, `F` features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import nnls

from tersor.core.search import Choice, CostPoint, CostRecord
from tersor.errors import ConfigError
from tersor.search.space import BLOCK, Space, Weight

LEAST_POINTS = 3
RIDGE = 0.003  # pull towards zero on every feature's share of the latency: settles what the points leave open
# Picojoules at 45 nm. Formats that are not here are shorter on disk only: they compute in float32.
MAC_PJ = {"float32": 3.7 + 0.9, "int8": 0.2 + 0.03, "int8-dynamic": 0.2 + 0.03}
DRAM_BYTE_PJ = 640 / 4
PJ_PER_MJ = 1e9

Array = np.ndarray[Any, np.dtype[np.float64]]
Coefficients = tuple[float, float, float]


@dataclass(frozen=True)
class Point:
    """A whole model that was measured.

    Attributes:
        choice: What it was made by.
        latency_ms: Of one call.
        size_bytes: Of its files.
        macs: Multiply-accumulates of one example.
        peak_memory_bytes: While it ran; None where it was not measured.

    Raises:
        ConfigError: for numbers that cannot have been measured.
    """

    choice: Choice
    latency_ms: float
    size_bytes: int
    macs: int
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_ms) and self.latency_ms > 0):
            raise ConfigError(f"Point.latency_ms: expected a finite number above 0, got {self.latency_ms!r}")
        if self.size_bytes <= 0 or self.macs < 0 or (self.peak_memory_bytes or 0) < 0:
            raise ConfigError(f"Point: expected bytes above 0 and no negative number, got {self}")


def design(space: Space, format: str, *, points: int = 24, seed: int = 0) -> list[Choice]:
    """Which whole models are measured for a cost table.

    The whole one; per kind of family all of them at their smallest; per kind of block (blocks of the same kinds of
    weights) half of them and all but one skipped, whose times differ by whole blocks; then seeded mixtures. Never all
    blocks are skipped.

    Args:
        space: Of the model.
        format: Number format.
        points: How many at most; fewer where the space has no more.
        seed: Of the mixtures.

    Raises:
        ConfigError: for fewer than 3 points, or a format that the space does not have.
    """
    if points < LEAST_POINTS:
        raise ConfigError(f"points: expected at least {LEAST_POINTS} whole models to measure, got {points!r}")
    blocks = [group.name for group in space.groups if group.kind == BLOCK]
    families = [group for group in space.groups if group.kind != BLOCK]
    wanted: list[dict[str, int]] = [{}]
    for kind in dict.fromkeys(family.kind for family in families):
        wanted.append({family.name: family.options[-1] for family in families if family.kind == kind})
    alike = _alike(space, blocks)
    wanted += [dict.fromkeys(names[1::2] or names, 0) for names in alike]
    wanted += [dict.fromkeys(names[1:], 0) for names in alike]
    generator = np.random.default_rng(seed)
    for _ in range(20 * points):
        mixture = {name: 0 for name, chance in zip(blocks, generator.random(len(blocks)), strict=True) if chance < 0.5}
        share = generator.random()
        for family in families:
            if generator.random() < share:
                mixture[family.name] = int(generator.choice(family.options))
        wanted.append(mixture)
    found: dict[str, Choice] = {}
    for options in wanted:
        choice = space.choice(options, format)
        if not blocks or len(choice.skipped) < len(blocks):
            found.setdefault(choice.key, choice)
    return list(found.values())[:points]


def _alike(space: Space, blocks: Sequence[str]) -> list[list[str]]:
    """Blocks by what is in them."""
    kinds: dict[str, list[str]] = {name: [] for name in blocks}
    for weight in space.weights:
        if weight.block in kinds:
            kinds[weight.block].append(weight.kind)
    found: dict[tuple[str, ...], list[str]] = {}
    for name in blocks:
        found.setdefault(tuple(sorted(kinds[name])), []).append(name)
    return list(found.values())


@dataclass(frozen=True)
class CostTable:
    """What models of a space cost in one number format on one target.

    Attributes:
        space: Of the model.
        format: Number format.
        constant_ms: Of one call, whatever is left of the model.
        coefficients: By kind of weight: milliseconds of its presence, per multiply-accumulate, per output.
        points: That the table is fitted on.
        forecasts: For each point what the table said before it was fitted on it; None if there was none.
    """

    space: Space
    format: str
    constant_ms: float
    coefficients: Mapping[str, Coefficients]
    points: tuple[Point, ...]
    forecasts: tuple[float | None, ...]

    @classmethod
    def fit(cls, space: Space, format: str, points: Sequence[Point]) -> CostTable:
        """Fits a table.

        Raises:
            ConfigError: if there are fewer than 3 points, or one is of another format or another space.
        """
        return cls._fitted(space, format, tuple(points), (None,) * len(points))

    def with_points(self, more: Sequence[Point]) -> CostTable:
        """The table fitted on more measurements, such as those of trials.

        What this table says of each of them is kept: `record` compares it with the measurement. Of a choice that is
        measured again it had known the answer, so that is no forecast.

        Raises:
            ConfigError: if a point is of another format or another space.
        """
        known = {point.choice.key for point in self.points}
        forecasts = (None if point.choice.key in known else self.predict_ms(point.choice) for point in more)
        return self._fitted(self.space, self.format, (*self.points, *more), (*self.forecasts, *forecasts))

    @classmethod
    def _fitted(
        cls, space: Space, format: str, points: tuple[Point, ...], forecasts: tuple[float | None, ...]
    ) -> CostTable:
        if len(points) < LEAST_POINTS:
            raise ConfigError(f"cost table: expected at least {LEAST_POINTS} measured models, got {len(points)}")
        for point in points:
            _check(space, format, point.choice)
        kinds = list(dict.fromkeys(weight.kind for weight in space.weights))
        features = np.stack([_features(space, kinds, point.choice) for point in points])
        constant, *found = _non_negative(features, np.array([point.latency_ms for point in points])).tolist()
        by_kind = {kind: (found[3 * at], found[3 * at + 1], found[3 * at + 2]) for at, kind in enumerate(kinds)}
        return cls(space, format, constant, by_kind, points, forecasts)

    def predict_ms(self, choice: Choice) -> float:
        """Latency of one call.

        Raises:
            ConfigError: if the choice is of another format or another space.
        """
        _check(self.space, self.format, choice)
        options = self.space.options(choice)
        return self.constant_ms + sum(
            self.weight_ms(weight, *self.space.shares(weight, options)) for weight in self.space.weights
        )

    def weight_ms(self, weight: Weight, rows: float, columns: float) -> float:
        """What one weight adds to the latency.

        Args:
            weight: Of the table's space.
            rows: Share of its rows that stay; 0 together with `columns` if its block is skipped.
            columns: Likewise.
        """
        if not rows and not columns:
            return 0.0
        present, per_mac, per_output = self.coefficients[weight.kind]
        return present + per_mac * weight.macs * rows * columns + per_output * weight.outputs * rows

    def predict_bytes(self, choice: Choice) -> float:
        """Size of the files: ``constant + bytes_per_entry · entries``, fitted like the latency."""
        return self._by_entries(self._size, choice)

    def predict_memory(self, choice: Choice) -> float | None:
        """Peak memory in bytes: ``constant + bytes_per_entry · entries``; None if it was measured of too few points.

        Activations are in the constant: where they are most of the memory, this says little.
        """
        return None if self._memory is None else self._by_entries(self._memory, choice)

    def predict_energy(self, choice: Choice) -> float:
        """A proxy of the energy of one example in millijoules, to compare choices by; nothing of it is measured.

        ``macs · pJ per multiply-accumulate + bytes · pJ per byte of DRAM``: every weight is read once from DRAM,
        activations never; numbers of 45 nm circuits, Horowitz 2014, https://doi.org/10.1109/ISSCC.2014.6757323.
        """
        computing = self.space.macs(choice) * MAC_PJ.get(self.format, MAC_PJ["float32"])
        return (computing + self.predict_bytes(choice) * DRAM_BYTE_PJ) / PJ_PER_MJ

    def record(self) -> CostRecord:
        """The table for the report; points that were forecast come with the forecast, not with today's fit."""
        return CostRecord(
            format=self.format,
            constant_ms=self.constant_ms,
            layers={weight.path: self.weight_ms(weight, 1.0, 1.0) for weight in self.space.weights},
            points=[
                CostPoint(
                    choice=point.choice,
                    measured_ms=point.latency_ms,
                    predicted_ms=self.predict_ms(point.choice) if forecast is None else forecast,
                    size_bytes=point.size_bytes,
                    macs=point.macs,
                    fitted=forecast is None,
                )
                for point, forecast in zip(self.points, self.forecasts, strict=True)
            ],
        )

    @cached_property
    def _size(self) -> Array:
        return self._fit_entries(self.points, [point.size_bytes for point in self.points])

    @cached_property
    def _memory(self) -> Array | None:
        known = [point for point in self.points if point.peak_memory_bytes]
        if len(known) < LEAST_POINTS:
            return None
        return self._fit_entries(known, [point.peak_memory_bytes or 0 for point in known])

    def _fit_entries(self, points: Sequence[Point], values: Sequence[int]) -> Array:
        features = np.array([[1.0, self.space.entries(point.choice)] for point in points])
        return _non_negative(features, np.array(values, dtype=float))

    def _by_entries(self, found: Array, choice: Choice) -> float:
        _check(self.space, self.format, choice)
        return float(found[0] + found[1] * self.space.entries(choice))


def _check(space: Space, format: str, choice: Choice) -> None:
    if choice.format != format:
        raise ConfigError(f"cost table: it is about {format}, got a choice in {choice.format}")
    unknown = sorted({*choice.skipped, *choice.widths} - set(space.by_name))
    if unknown:
        raise ConfigError(f"cost table: its space has no {unknown}; it was fitted for another model")


def _features(space: Space, kinds: Sequence[str], choice: Choice) -> Array:
    """`[F]`: one, and per kind of weight how many stay, what they compute, what they answer with."""
    options = space.options(choice)
    found = {kind: np.zeros(3) for kind in kinds}
    for weight in space.weights:
        rows, columns = space.shares(weight, options)
        if rows or columns:
            found[weight.kind] += (1.0, weight.macs * rows * columns, weight.outputs * rows)
    return np.concatenate([np.ones(1), *found.values()])


def _non_negative(features: Array, values: Array) -> Array:
    """Coefficients from 0 with the least squared relative errors: `[P, F]`, `[P]` -> `[F]`."""
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    rows = features / scale / values[:, None]
    ridge = RIDGE / np.median(values) * np.eye(len(scale))
    target = np.concatenate([np.ones(len(values)), np.zeros(len(scale))])
    found: Array = nnls(np.concatenate([rows, ridge]), target)[0] / scale
    return found
