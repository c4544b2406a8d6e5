from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ConfigError
from tersor.prune.allocation import below, erk, global_ranking, per_layer, reach, spare, uniform
from zoo import normal

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=5)
AMOUNT, FLOOR = st.floats(0, 0.99), st.floats(0, 0.6)


def removed(shares: dict[str, float], sizes: dict[str, int]) -> dict[str, int]:
    return {name: round(share * sizes[name]) for name, share in shares.items()}


@settings(max_examples=100, deadline=None)
@given(SIZES, AMOUNT, FLOOR)
def test_floors_hold_and_totals_fit(given_sizes: list[int], amount: float, floor: float) -> None:
    sizes = {f"g{index}": size for index, size in enumerate(given_sizes)}
    scores = {name: normal(size, seed=size) * 10**index for index, (name, size) in enumerate(sizes.items())}
    room = {name: spare(size, floor) for name, size in sizes.items()}
    total = sum(sizes.values())
    for shares in (
        uniform(sizes, amount, floor),
        global_ranking(scores, amount, floor),
        erk({name: (size,) for name, size in sizes.items()}, amount, floor),
        per_layer(sizes, {"*": amount}, floor=floor),
        below(scores, amount, floor),
    ):
        assert set(shares) == set(sizes)
        gone = removed(shares, sizes)
        assert all(0 <= gone[name] <= room[name] < sizes[name] for name in sizes)
    assert sum(removed(global_ranking(scores, amount, floor), sizes).values()) == min(
        round(amount * total), sum(room.values())
    )
    flat = removed(uniform(sizes, amount, floor), sizes)
    assert all(flat[name] == min(round(amount * size), room[name]) for name, size in sizes.items())


@settings(max_examples=60, deadline=None)
@given(SIZES, AMOUNT, AMOUNT, FLOOR)
def test_more_asked_is_never_less_removed(given_sizes: list[int], one: float, other: float, floor: float) -> None:
    low, high = sorted((one, other))
    sizes = {f"g{index}": size for index, size in enumerate(given_sizes)}
    shapes = {name: (size, 3) for name, size in sizes.items()}
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    scores = {name: normal(size, seed=size) for name, size in sizes.items()}
    for less, more in (
        (uniform(sizes, low, floor), uniform(sizes, high, floor)),
        (global_ranking(scores, low, floor), global_ranking(scores, high, floor)),
    ):
        assert all(less[name] <= more[name] + 1e-12 for name in sizes)
    less_gone = removed(erk(shapes, low, floor), weights)
    more_gone = removed(erk(shapes, high, floor), weights)
    assert all(less_gone[name] <= more_gone[name] for name in sizes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40), st.sampled_from([1, 3, 5])), min_size=1, max_size=5),
    st.floats(0, 0.95),
)
def test_erk_removes_what_was_asked_and_keeps_in_proportion(shapes: list[tuple[int, int, int]], amount: float) -> None:
    named = {f"g{index}": (o, i, k, k) for index, (o, i, k) in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    shares = erk(named, amount)
    assert sum(shares[name] * sizes[name] for name in named) == pytest.approx(
        amount * sum(sizes.values()), abs=1 + len(sizes)
    )
    density = {name: (1 - shares[name]) / (sum(shape) / sizes[name]) for name, shape in named.items()}
    sparse = [
        density[name] for name in named if shares[name] > 1e-9 and round(shares[name] * sizes[name]) + 1 < sizes[name]
    ]
    assert all(value == pytest.approx(sparse[0], rel=1e-6) for value in sparse)


def test_global_ranking_counts_what_went_before() -> None:
    scores = {"a": torch.tensor([-torch.inf, -torch.inf, 9.0, 8.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert global_ranking(scores, 0.5) == {"a": 0.5, "b": 0.5}
    assert global_ranking(scores, 0.1) == {"a": 0.5, "b": 0.0}
    assert global_ranking({}, 0.5) == {}


def test_amounts_by_pattern() -> None:
    sizes = {"layer1.weight": 10, "layer2.weight": 10, "head": 10}
    shares = per_layer(sizes, {"layer*": 0.5, "layer2*": 0.2}, default=0.1)
    assert shares == {"layer1.weight": 0.5, "layer2.weight": 0.2, "head": 0.1}
    with pytest.raises(ConfigError, match=r"'stem\*' names no layer; there are \['layer1"):
        per_layer(sizes, {"stem*": 0.5})
    with pytest.raises(ConfigError, match=r"\[0, 1\), got 1"):
        per_layer(sizes, {"head": 1.0})


@pytest.mark.parametrize(("amount", "floor"), [(1.0, 0.0), (-0.1, 0.0), (0.5, 1.0), (math.nan, 0.0), (0.5, math.nan)])
def test_shares_out_of_range_are_refused(amount: float, floor: float) -> None:
    for call in (
        lambda: uniform({"a": 3}, amount, floor),
        lambda: global_ranking({"a": torch.ones(3)}, amount, floor),
        lambda: erk({"a": (3, 3)}, amount, floor),
    ):
        with pytest.raises(ConfigError, match="amount and floor"):
            call()


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 1000), st.sampled_from([1, 7, 100, 100_000]))
def test_reach_comes_just_under_the_target(target: float, steps: int) -> None:
    asked: list[float] = []

    def cost(amount: float) -> float:  # falls in steps, as channel counts do
        asked.append(amount)
        return 1000 * (1 - math.floor(amount * steps) / steps) + 10

    found = reach(target, cost, tolerance=1e-3)
    assert len(asked) <= 13
    assert found.cost == cost(found.amount)
    assert found.reached == (cost(0.99) <= target)
    if found.reached:
        assert found.cost <= target
        assert found.amount == 0 or cost(found.amount - 1e-3) > target
    else:
        assert found.amount == 0.99 or found.cost == cost(0.0)


def test_reach_takes_nothing_where_nothing_is_needed() -> None:
    assert reach(5, lambda amount: 5 - amount) == (0.0, 5.0, True)
    with pytest.raises(ConfigError, match="tolerance > 0"):
        reach(5, lambda amount: 5 - amount, tolerance=0)
