from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.search.damage import DamageTable
from tersor.search.program import CostLimits, fastest, solve, sweep
from tersor.search.space import BLOCK, Group, Space, Weight

FORMAT = "int8"


@dataclass(frozen=True)
class Prices:
    """A cost table whose coefficients are given, and that notes what it was asked of."""

    space: Space
    constant_ms: float = 0.1
    base_bytes: float = 500.0
    memory: bool = True
    asked: list[Choice] = field(default_factory=list)

    def weight_ms(self, weight: Weight, rows: float, columns: float) -> float:
        if not rows and not columns:
            return 0.0
        return 0.01 + 1e-6 * weight.macs * rows * columns + 1e-6 * weight.outputs * rows

    def predict_ms(self, choice: Choice) -> float:
        self.asked.append(choice)
        options = self.space.options(choice)
        return self.constant_ms + sum(self.weight_ms(w, *self.space.shares(w, options)) for w in self.space.weights)

    def predict_bytes(self, choice: Choice) -> float:
        self.asked.append(choice)
        return self.base_bytes + 4 * self.space.entries(choice)

    def predict_memory(self, choice: Choice) -> float | None:
        return 9000 + 8 * self.space.entries(choice) if self.memory else None


@dataclass(frozen=True)
class Bent(Prices):
    """Some columns cost more than their share, or less, so that costs are not linear in it."""

    bend: float = 0.0

    def weight_ms(self, weight: Weight, rows: float, columns: float) -> float:
        return super().weight_ms(weight, rows, columns) * (1 + self.bend * columns * (1 - columns))


def made(seed: int, blocks: int, inside: int, streams: int, columns: int = 1) -> tuple[Space, DamageTable]:
    """A random space: families inside blocks, streams through all of them; damages of any sign and size."""
    random = np.random.default_rng(seed)
    skips = [Group(f"block{n}", BLOCK, (1, 0)) for n in range(blocks)]
    inner = [Group(f"inner{n}", "channel", (8, 4, 2), f"block{n}" if n < blocks else None) for n in range(inside)]
    outer = [Group(f"stream{n}", "width", (16, 8)) for n in range(streams)]
    weights = []
    for number, family in enumerate(inner):
        through = tuple((group.name, 1 / max(1, columns)) for group in outer[:columns])
        for kind, rows, cols in (("in", ((family.name, 1.0),), through), ("out", through[:1], ((family.name, 1.0),))):
            weights.append(
                Weight(
                    f"layer{number}.{kind}",
                    kind,
                    macs=int(random.integers(10_000, 300_000)),
                    outputs=int(random.integers(100, 5000)),
                    entries=int(random.integers(100, 3000)),
                    block=family.inside,
                    rows=rows,
                    columns=cols,
                )
            )
    weights.append(Weight("head", "head", 20_000, 10, 640, None, (), ((outer[-1].name, 1.0),) if outer else ()))
    groups = (*skips, *inner, *outer)
    damages = {g.name: {o: float(random.normal(0.3, 0.4)) for o in g.options[1:]} for g in groups}
    pairs = {}
    for one, other in itertools.combinations(groups, 2):
        if random.random() < 0.4:
            pairs[one.name, other.name] = float(random.normal(0, 0.3))
    return Space(groups, tuple(weights), ("float32", FORMAT)), DamageTable("divergence", damages, pairs)


def everything(space: Space) -> Iterator[Choice]:
    """All choices of a space, once each."""
    found = {}
    for joint in itertools.product(*(group.options for group in space.groups)):
        options = dict(zip((group.name for group in space.groups), joint, strict=True))
        choice = space.choice(options, FORMAT)
        found[choice.key] = choice
    return iter(found.values())


def between(values: list[float], share: float) -> float:
    """A limit that no choice meets exactly."""
    ordered = sorted(set(values))
    at = min(int(share * len(ordered)), len(ordered) - 1)
    return ordered[at] + (min(ordered[at + 1] - ordered[at], 0.1) if at + 1 < len(ordered) else 0.1) / 2


spaces = st.builds(
    made, seed=st.integers(0, 10_000), blocks=st.integers(0, 3), inside=st.integers(0, 3), streams=st.integers(0, 2)
)
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(spaces, st.floats(0, 1), st.floats(0, 1))
def test_no_choice_within_the_limits_damages_less(given: tuple[Space, DamageTable], time: float, size: float) -> None:
    space, damages = given
    prices = Prices(space)
    choices = list(everything(space))
    limits = CostLimits(
        max_ms=between([prices.predict_ms(choice) for choice in choices], time),
        max_bytes=between([prices.predict_bytes(choice) for choice in choices], size),
    )
    able = [
        choice
        for choice in choices
        if prices.predict_ms(choice) <= limits.max_ms and prices.predict_bytes(choice) <= limits.max_bytes
    ]
    found = solve(space, prices, damages, limits, format=FORMAT)
    assert (found is None) == (not able)
    if found is not None:
        assert found.format == FORMAT
        assert found.key in {choice.key for choice in able}
        least = min(damages.predict(space, choice) for choice in able)
        assert damages.predict(space, found) == pytest.approx(least, abs=1e-6)


@few
@given(spaces)
def test_what_was_chosen_may_be_forbidden_until_nothing_is_left(given: tuple[Space, DamageTable]) -> None:
    space, damages = given
    prices = Prices(space)
    ordered = sorted(damages.predict(space, choice) for choice in everything(space))[:4]
    without: list[Choice] = []
    for expected in ordered:
        choice = solve(space, prices, damages, CostLimits(), format=FORMAT, without=without)
        assert choice is not None
        assert choice not in without
        assert damages.predict(space, choice) == pytest.approx(expected, abs=1e-6)
        without.append(choice)


def test_nothing_is_left_when_all_are_forbidden() -> None:
    space, damages = made(0, blocks=1, inside=1, streams=1)
    choices = list(everything(space))
    assert solve(space, Prices(space), damages, CostLimits(), format=FORMAT, without=choices) is None
    left = solve(space, Prices(space), damages, CostLimits(), format=FORMAT, without=choices[1:])
    assert left == choices[0]


def test_choices_of_other_formats_and_spaces_forbid_nothing() -> None:
    space, damages = made(1, blocks=2, inside=2, streams=1)
    prices = Prices(space)
    best = solve(space, prices, damages, CostLimits(), format=FORMAT)
    assert best is not None
    others = [best.model_copy(update={"format": "float32"}), Choice(widths={"stream0": 3}, format=FORMAT)]
    assert solve(space, prices, damages, CostLimits(), format=FORMAT, without=others) == best


@few
@given(spaces)
def test_the_fastest_is_as_fast_as_any(given: tuple[Space, DamageTable]) -> None:
    space, _ = given
    prices = Prices(space)
    least = min(map(prices.predict_ms, everything(space)))
    assert prices.predict_ms(fastest(space, prices, FORMAT)) == pytest.approx(least, rel=1e-6)


@few
@given(spaces, st.integers(1, 6))
def test_a_sweep_becomes_faster_and_damages_more(given: tuple[Space, DamageTable], points: int) -> None:
    space, damages = given
    prices = Prices(space)
    found = sweep(space, prices, damages, format=FORMAT, points=points)
    assert 1 <= len(found) <= points
    times = [prices.predict_ms(choice) for choice in found]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)
    lost = [damages.predict(space, choice) for choice in found]
    assert all(after >= before - 1e-6 for before, after in itertools.pairwise(lost))
    if points > 1:
        assert times[-1] == pytest.approx(prices.predict_ms(fastest(space, prices, FORMAT)), rel=1e-5)


def test_a_sweep_keeps_to_its_bounds_and_skips_what_is_known() -> None:
    space, damages = made(3, blocks=3, inside=3, streams=1)
    prices = Prices(space)
    whole = prices.predict_ms(space.choice({}, FORMAT))
    low, high = whole * 0.5, whole * 0.8
    first = sweep(space, prices, damages, format=FORMAT, points=4, between=(low, high))
    assert prices.predict_ms(first[0]) <= high * (1 + 1e-6)
    assert prices.predict_ms(first[-1]) <= low * (1 + 1e-6)
    second = sweep(space, prices, damages, format=FORMAT, points=4, between=(low, high), without=first)
    assert second
    assert not {choice.key for choice in first} & {choice.key for choice in second}
    with pytest.raises(ConfigError, match="points"):
        sweep(space, prices, damages, format=FORMAT, points=0)


def test_limits_that_nothing_meets_give_none() -> None:
    space, damages = made(2, blocks=2, inside=2, streams=1)
    prices = Prices(space)
    for limits in (CostLimits(max_ms=0.05), CostLimits(max_bytes=10), CostLimits(max_memory_bytes=8999)):
        assert solve(space, prices, damages, limits, format=FORMAT) is None


def test_memory_is_limited_where_it_is_known() -> None:
    space, damages = made(2, blocks=2, inside=2, streams=1)
    damages = DamageTable("divergence", {name: dict.fromkeys(row, 0.5) for name, row in damages.damages.items()})
    prices = Prices(space)
    needs = [prices.predict_memory(choice) or 0.0 for choice in everything(space)]
    limit = between(needs, 0.5)
    found = solve(space, prices, damages, CostLimits(max_memory_bytes=limit), format=FORMAT)
    assert found is not None
    assert (prices.predict_memory(found) or 0.0) <= limit < max(needs)
    with pytest.raises(ConfigError, match="knows no memory"):
        solve(space, Prices(space, memory=False), damages, CostLimits(max_memory_bytes=limit), format=FORMAT)


def test_a_skipped_block_counts_its_families_for_nothing() -> None:
    groups = (
        Group("block", BLOCK, (1, 0)),
        Group("inner", "channel", (8, 2), "block"),
        Group("idle", "channel", (4, 1), "block"),  # it sizes no weight
    )
    weight = Weight("w", "w", 100_000, 0, 100, "block", (("inner", 1.0),))
    space = Space(groups, (weight,), (FORMAT,))
    # families that would heal the model, were they cut in a block that is gone
    row = {"block": {0: 0.5}, "inner": {2: -5.0}, "idle": {1: -1.0}}
    damages = DamageTable("loss", row, {("block", "inner"): -9.0})
    prices = Prices(space)
    limits = CostLimits(max_ms=0.1001)
    found = solve(space, prices, damages, limits, format=FORMAT)
    assert found == Choice(skipped=("block",), format=FORMAT)
    assert damages.predict(space, found) == 0.5
    assert solve(space, prices, damages, limits, format=FORMAT, without=[found]) is None
    best = solve(space, prices, damages, CostLimits(), format=FORMAT)
    assert best == Choice(widths={"inner": 2, "idle": 1}, format=FORMAT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_weights_of_many_families_are_exact_while_costs_are_linear_in_both_shares(seed: int, share: float) -> None:
    space, damages = made(seed, blocks=1, inside=2, streams=6, columns=6)  # 2 · 3 · 2^6 joint options of a weight
    prices = Prices(space)
    choices = list(everything(space))
    limit = between([prices.predict_ms(choice) for choice in choices], share)
    least = min(damages.predict(space, choice) for choice in choices if prices.predict_ms(choice) <= limit)
    prices.asked.clear()
    found = solve(space, prices, damages, CostLimits(max_ms=limit), format=FORMAT)
    assert prices.asked == [found]  # the first answer was right
    assert prices.predict_ms(found) <= limit
    assert damages.predict(space, found) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bend", [-0.9, 0.9])
def test_other_costs_of_many_families_keep_the_limit(seed: int, bend: float) -> None:
    space, damages = made(seed, blocks=1, inside=2, streams=6, columns=6)
    damages = DamageTable(
        "divergence", {name: {o: abs(d) for o, d in row.items()} for name, row in damages.damages.items()}
    )
    prices = Bent(space, bend=bend)
    times = [prices.predict_ms(choice) for choice in everything(space)]
    for share in (0.2, 0.4, 0.6, 0.8):
        limit = between(times, share)
        found = solve(space, prices, damages, CostLimits(max_ms=limit), format=FORMAT)
        assert found is not None
        assert prices.predict_ms(found) <= limit * (1 + 1e-6)


def test_bytes_of_what_nothing_decides_are_counted() -> None:
    space, damages = made(5, blocks=2, inside=2, streams=0)  # the head belongs to no group
    prices = Prices(space)
    sizes = [prices.predict_bytes(choice) for choice in everything(space)]
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        prices.asked.clear()
        found = solve(space, prices, damages, CostLimits(max_bytes=between(sizes, share)), format=FORMAT)
        assert found is not None
        assert len(prices.asked) == 3  # the whole, the smallest, and the first answer


def resnet_like(seed: int = 0) -> tuple[Space, DamageTable]:
    """As large as that of ResNet-56: 25 blocks, 27 families inside them, three streams, 55 weights."""
    random = np.random.default_rng(seed)
    blocks, families, weights = [], [], []
    streams = [Group(f"stream{stage}", "width", options) for stage, options in enumerate(OPTIONS)]
    for stage, number in itertools.product(range(3), range(9)):
        path, size = f"layer{stage}.{number}", 16 << stage
        block = None if stage and not number else path
        blocks += [Group(path, BLOCK, (1, 0))] if block else []
        families.append(Group(f"{path}.conv1.weight[0]", "channel", OPTIONS[stage], block))
        inner, outer = ((families[-1].name, 1.0),), ((streams[stage].name, 1.0),)
        for name, rows, columns in (("conv1", inner, outer), ("conv2", outer, inner)):
            outputs, entries = (16 << 10) >> stage, 9 * size**2
            weights.append(Weight(f"{path}.{name}", f"{stage}", 2_359_296, outputs, entries, block, rows, columns))
    weights.append(Weight("fc", "fc", 640, 10, 640, None, (), ((streams[2].name, 1.0),)))
    groups = (*blocks, *families, *streams)
    damages = {g.name: {o: (1 - o / g.options[0]) ** 2 * random.lognormal() for o in g.options[1:]} for g in groups}
    pairs = {(a.name, b.name): float(random.normal(0, 0.1)) for a, b in itertools.pairwise(blocks[:12])}
    return Space(groups, tuple(weights), (FORMAT,)), DamageTable("divergence", damages, pairs)


OPTIONS = [tuple(int(share * (16 << stage)) for share in (1, 0.75, 0.5, 0.375, 0.25)) for stage in range(3)]


def test_a_space_as_large_as_that_of_resnet56_is_solved() -> None:
    space, damages = resnet_like()
    prices = Prices(space)
    limit = 0.5 * prices.predict_ms(space.choice({}, FORMAT))
    found = solve(space, prices, damages, CostLimits(max_ms=limit), format=FORMAT)
    assert found is not None
    assert prices.predict_ms(found) <= limit * (1 + 1e-6)
    assert damages.predict(space, found) < damages.predict(space, fastest(space, prices, FORMAT))
    # no single step back towards the whole fits and damages less
    options = space.options(found)
    for group in space.groups:
        for option in group.options:
            other = space.choice(options | {group.name: option}, FORMAT)
            if prices.predict_ms(other) <= limit:
                assert damages.predict(space, other) >= damages.predict(space, found) - 1e-6


def test_a_program_without_time_finds_nothing() -> None:
    space, damages = resnet_like()
    limits = CostLimits(max_ms=0.5 * Prices(space).predict_ms(space.choice({}, FORMAT)))
    assert solve(space, Prices(space), damages, limits, format=FORMAT, time_limit_seconds=0.0) is None


def test_what_cannot_be_asked_is_refused() -> None:
    space, damages = made(0, blocks=1, inside=1, streams=1)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_ms"):
            CostLimits(max_ms=value)
    with pytest.raises(ConfigError, match="format"):
        solve(space, Prices(space), damages, CostLimits(), format="int3")
    with pytest.raises(ConfigError, match="nothing was measured"):
        solve(space, Prices(space), DamageTable("divergence", {}), CostLimits(), format=FORMAT)
