"""The integer program: which blocks and units go so that least is damaged within limits on time, bytes and memory.

    min Σ damage(choice)    subject to    predicted cost(choice) <= limit

One binary variable per group and option; what a weight costs under all options of its groups, and what pairs of
decisions do beyond their sum, are tables over joint options, tied to the options by their marginals. Kurtić et al.
2023 (ZipLM), https://arxiv.org/abs/2302.04089; Yao et al. 2021 (HAWQ-V3), https://arxiv.org/abs/2011.10680.

Shapes: `V` variables; three values each: milliseconds, entries, damage.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Protocol

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.search.damage import DamageTable
from tersor.search.space import Group, Space, Weight

LARGEST_TABLE = 128  # joint options of one weight
SCALE = 1e4  # HiGHS tolerates absolute errors of 1e-6: limits and objectives are brought to this size
SLACK = 1e-6  # of a limit: variables are whole to this tolerance
CORRECTIONS = 8  # of a limit that the cost table finds broken

Array = np.ndarray[Any, np.dtype[np.float64]]
MS, ENTRIES, DAMAGE = range(3)


class Costs(Protocol):
    """What the program asks of a cost table of one number format; bytes and memory are linear in the entries."""

    @property
    def constant_ms(self) -> float:
        """Of one call, whatever is left of the model."""

    def weight_ms(self, weight: Weight, rows: float, columns: float) -> float:
        """What a weight costs with these shares of its rows and columns."""

    def predict_ms(self, choice: Choice) -> float:
        """The constant and all weights."""

    def predict_bytes(self, choice: Choice) -> float:
        """Size of the files."""

    def predict_memory(self, choice: Choice) -> float | None:
        """Peak memory in bytes; None if it is not known."""


@dataclass(frozen=True)
class CostLimits:
    """What a choice may cost at most, as the cost table predicts it; None for no limit.

    Raises:
        ConfigError: for limits that are not finite or not above 0.
    """

    max_ms: float | None = None
    max_bytes: float | None = None
    max_memory_bytes: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"CostLimits.{name}: expected a finite number above 0, got {value!r}")


def solve(
    space: Space,
    costs: Costs,
    damages: DamageTable,
    limits: CostLimits,
    *,
    format: str,
    without: Collection[Choice] = (),
    time_limit_seconds: float = 20.0,
) -> Choice | None:
    """The choice that damages least within the limits.

    Weights with more than 128 joint options are expanded around the whole, in single families and in pairs of one of
    their rows and one of their columns: exact where costs are linear in each of the two shares, as a `CostTable`'s are.
    Where they are not, the limits are narrowed until the cost table agrees, and something that fits may be missed.
    CostLimits hold to a millionth.

    Args:
        space: Of the model.
        costs: In this number format.
        damages: Of the same space.
        limits: All of them hold.
        format: Of the choice.
        without: Choices that may not come out again.
        time_limit_seconds: After which the best that was found comes out.

    Returns:
        None if no choice meets the limits, or none was found in time.

    Raises:
        ConfigError: if the space has no such format, a damage is missing, or memory is limited and not known.
    """
    return _Program(space, costs, damages, format).best(limits, without, time_limit_seconds)


def sweep(
    space: Space,
    costs: Costs,
    damages: DamageTable,
    *,
    format: str,
    points: int = 8,
    between: tuple[float, float] | None = None,
    without: Collection[Choice] = (),
) -> list[Choice]:
    """The choices that damage least under latencies spaced evenly, the slowest first.

    All are distinct, so there may be fewer than `points`; latency falls and damage does not fall from one to the next.

    Args:
        space: Of the model.
        costs: In this number format.
        damages: Of the same space.
        format: Of the choices.
        points: How many latencies.
        between: The smallest and the largest in milliseconds; by default those of the fastest choice that there is and
            of the whole model.
        without: Choices that may not come out again.

    Raises:
        ConfigError: as `solve`, and without points.
    """
    if points < 1:
        raise ConfigError(f"points: expected at least 1, got {points}")
    program = _Program(space, costs, damages, format)
    if between is None:
        between = costs.predict_ms(program.fastest()), costs.predict_ms(space.choice({}, format))
    low, high = between
    found: list[Choice] = []
    for budget in np.linspace(high, low, points).tolist():
        if found and costs.predict_ms(found[-1]) <= budget:
            continue  # what damages least within more is within this too
        choice = program.best(CostLimits(max_ms=budget), without)
        if choice is not None:
            found.append(choice)
    return found


def fastest(space: Space, costs: Costs, format: str) -> Choice:
    """The choice with the least predicted latency, whatever it damages.

    Raises:
        ConfigError: if the space has no such format.
    """
    return _Program(space, costs, None, format).fastest()


@dataclass(frozen=True)
class _Limit:
    """``amounts · variables <= largest - constant``; `predict` knows better."""

    largest: float
    constant: float
    amounts: Array
    predict: Callable[[Choice], float]


class _Program:
    """One space in one number format; the limits are given later."""

    def __init__(self, space: Space, costs: Costs, damages: DamageTable | None, format: str) -> None:
        self.space, self.costs, self.format = space, costs, format
        self.whole = space.choice({}, format)
        self.place = {
            (group.name, option): place
            for place, (group, option) in enumerate((g, option) for g in space.groups for option in g.options)
        }
        self.order = {group.name: number for number, group in enumerate(space.groups)}
        self.tables: dict[tuple[str, ...], dict[tuple[int, ...], Array]] = {}
        for weight in space.weights:
            self._add_weight(weight)
        if damages is not None:
            self._add_damages(damages)
        self._lay_out()

    def best(self, limits: CostLimits, without: Collection[Choice], seconds: float = 20.0) -> Choice | None:
        """The choice that damages least."""
        rows = self._limits(limits)
        cuts = self._cuts(without)
        narrowed = [1.0] * len(rows)
        for _ in range(CORRECTIONS):
            bounds = [self._row(limit, narrow) for limit, narrow in zip(rows, narrowed, strict=True)]
            choice = self._run(self.values[:, DAMAGE], [*bounds, *cuts], seconds)
            if choice is None:
                return None
            excess = [limit.predict(choice) / limit.largest for limit in rows]
            if all(over <= 1 + SLACK for over in excess):
                return choice
            narrowed = [n / max(1.0, over * (1 + SLACK)) for n, over in zip(narrowed, excess, strict=True)]
        return None

    def fastest(self) -> Choice:
        """The choice that takes least time."""
        found = self._run(self.values[:, MS], [])
        return self.whole if found is None else found

    def _add_weight(self, weight: Weight) -> None:
        def amounts(options: Mapping[str, int]) -> Array:
            rows, columns = self.space.shares(weight, options)
            return np.array([self.costs.weight_ms(weight, rows, columns), weight.entries * rows * columns, 0.0])

        names = sorted(weight.groups, key=self.order.__getitem__)
        if math.prod(len(self.space.by_name[name].options) for name in names) <= LARGEST_TABLE:
            self._add(names, amounts)
            return
        # around the whole: alone, and a family of rows with one of columns; nothing else is in a product of two shares
        always = [name for name in names if name == weight.block]
        families = [name for name in names if name != weight.block]
        sides = [{name for name, _ in sizes} for sizes in (weight.rows, weight.columns)]
        crossed = [
            pair
            for pair in combinations(families, 2)
            if any(one in sides[0] and other in sides[1] for one, other in (pair, pair[::-1]))
        ]
        for part in ((), *((name,) for name in families), *crossed):

            def change(options: Mapping[str, int], part: tuple[str, ...] = part) -> Array:
                total = np.zeros(3)
                for size in range(len(part) + 1):
                    for some in combinations(part, size):
                        sign = (-1) ** (len(part) - size)
                        total += sign * amounts({name: options[name] for name in (*always, *some)})
                return total

            self._add([*always, *part], change)

    def _add_damages(self, damages: DamageTable) -> None:
        for group in self.space.groups:

            def alone(options: Mapping[str, int], group: Group = group) -> Array:
                return np.array([0.0, 0.0, damages.of(group, options[group.name])])

            self._add([group.name], alone)
        for pair, extra in damages.pairs.items():

            def together(options: Mapping[str, int], extra: float = extra) -> Array:
                strengths = [damages.strength(self.space.by_name[name], option) for name, option in options.items()]
                return np.array([0.0, 0.0, extra * math.prod(strengths)])

            self._add(sorted(pair, key=self.order.__getitem__), together)

    def _add(self, names: Sequence[str], amounts: Callable[[Mapping[str, int]], Array]) -> None:
        """Adds to the table over these groups; joint options that cannot be are left out."""
        groups = [self.space.by_name[name] for name in names]
        table = self.tables.setdefault(tuple(names), {})
        for joint in product(*(group.options for group in groups)):
            options = dict(zip(names, joint, strict=True))
            if all(_possible(group, options) for group in groups):
                table[joint] = table.get(joint, np.zeros(3)) + amounts(options)

    def _lay_out(self) -> None:
        """Variables, their values, and what always holds."""
        rows: list[dict[int, float]] = []
        sums: list[float] = []
        for group in self.space.groups:
            rows.append({self.place[group.name, option]: 1.0 for option in group.options})
            sums.append(1.0)
        values = list(np.zeros((len(self.place), 3)))
        self.constant = np.zeros(3)
        for names, table in self.tables.items():
            if not names:
                self.constant = self.constant + table[()]
            elif len(names) == 1:
                for (option,), amounts in table.items():
                    values[self.place[names[0], option]] = values[self.place[names[0], option]] + amounts
            else:
                first = len(values)
                values.extend(table.values())
                for at, name in enumerate(names):
                    for option in self.space.by_name[name].options:
                        row = {first + number: 1.0 for number, joint in enumerate(table) if joint[at] == option}
                        rows.append(row | {self.place[name, option]: -1.0})
                        sums.append(0.0)
        self.values: Array = np.array(values).reshape(-1, 3)
        self.always = [LinearConstraint(self._matrix(rows), sums, sums)] if rows else []
        inside = [
            {self.place[group.inside, 0]: 1.0, self.place[group.name, group.options[0]]: -1.0}
            for group in self.space.groups
            if group.inside in self.order
        ]
        if inside:
            self.always.append(LinearConstraint(self._matrix(inside), -np.inf, 0.0))

    def _limits(self, limits: CostLimits) -> list[_Limit]:
        found = []
        if limits.max_ms is not None:
            constant = self.costs.constant_ms + self.constant[MS]
            found.append(_Limit(limits.max_ms, constant, self.values[:, MS], self.costs.predict_ms))
        if limits.max_bytes is not None:
            found.append(self._by_entries(limits.max_bytes, self.costs.predict_bytes))
        if limits.max_memory_bytes is not None:

            def memory(choice: Choice) -> float:
                value = self.costs.predict_memory(choice)
                if value is None:
                    raise ConfigError(
                        "CostLimits.max_memory_bytes: the cost table knows no memory; measure it with latency"
                    )
                return value

            found.append(self._by_entries(limits.max_memory_bytes, memory))
        return found

    def _by_entries(self, largest: float, predict: Callable[[Choice], float]) -> _Limit:
        """What is linear in the entries: two choices tell how."""
        less = self.space.choice({group.name: group.options[-1] for group in self.space.groups}, self.format)
        most, entries = predict(self.whole), self.space.entries(self.whole)
        fewer = entries - self.space.entries(less)
        each = (most - predict(less)) / fewer if fewer else 0.0
        constant = most - each * (entries - self.constant[ENTRIES])
        return _Limit(largest, constant, each * self.values[:, ENTRIES], predict)

    def _row(self, limit: _Limit, narrowed: float) -> Any:
        scale = SCALE / limit.largest
        largest = limit.largest * narrowed * (1 + SLACK / 10) - limit.constant
        return LinearConstraint(csr_array((limit.amounts * scale)[None]), -np.inf, largest * scale)

    def _cuts(self, without: Collection[Choice]) -> list[Any]:
        """Of the options of a choice at least one is another one."""
        rows = []
        for choice in {choice.key: choice for choice in without if choice.format == self.format}.values():
            options = self.space.options(choice)
            if all(pair in self.place for pair in options.items()):
                rows.append({self.place[pair]: 1.0 for pair in options.items()})
        if not rows:
            return []
        return [LinearConstraint(self._matrix(rows), -np.inf, len(self.space.groups) - 1)]

    def _run(self, goal: Array, constraints: Sequence[Any], seconds: float = 20.0) -> Choice | None:
        if not len(goal):
            return self.whole if all(np.all(c.ub >= 0) for c in constraints) else None
        largest = float(np.abs(goal).max())
        binary = np.zeros(len(goal))
        binary[: len(self.place)] = 1
        with _nothing_printed():
            result = milp(
                goal * (SCALE / largest if largest > 0 else 1.0),
                integrality=binary,
                bounds=Bounds(0, 1),
                constraints=[*self.always, *constraints],
                options={"mip_rel_gap": 0.0, "time_limit": seconds},
            )
        if result.x is None:
            return None
        options = {name: option for (name, option), place in self.place.items() if result.x[place] > 0.5}
        return self.space.choice(options, self.format)

    def _matrix(self, rows: Sequence[Mapping[int, float]]) -> Any:
        width = len(self.values)
        numbers = [number for number, row in enumerate(rows) for _ in row]
        places = [place for row in rows for place in row]
        return csr_array(([v for row in rows for v in row.values()], (numbers, places)), shape=(len(rows), width))


def _possible(group: Group, options: Mapping[str, int]) -> bool:
    """Whether a family is whole if its block, among these options, is skipped."""
    return options[group.name] == group.options[0] or options.get(group.inside or "", 1) != 0


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """HiGHS now and then prints a line of its own to the process's standard output, where results belong."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
