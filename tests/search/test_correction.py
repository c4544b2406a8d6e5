from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.search.correction import DropModel, adjust
from tersor.search.damage import DamageTable
from tersor.search.space import BLOCK, Group, Space

numbers = st.floats(-0.5, 20, allow_nan=False)
trials = st.lists(st.tuples(numbers, st.floats(-0.1, 1)), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trials, st.lists(numbers, min_size=2, max_size=6))
def test_more_damage_never_means_less_drop(given: list[tuple[float, float]], asked: list[float]) -> None:
    model = DropModel().fit([damage for damage, _ in given], [drop for _, drop in given])
    found = [model.predict(damage) for damage in sorted([*asked, *(damage for damage, _ in given)])]
    assert all(map(math.isfinite, found))
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(found))


def test_without_trials_a_drop_is_the_damage() -> None:
    for model in (DropModel(), DropModel().fit([], []), DropModel().fit([1.0], [0.5]).fit([], [])):
        assert [model.predict(damage) for damage in (0.0, 0.3, 7.0)] == [0.0, 0.3, 7.0]


def test_few_trials_give_a_line_through_the_origin() -> None:
    model = DropModel().fit([math.e - 1], [0.2])
    assert model.predict(math.e - 1) == pytest.approx(0.2)
    assert model.predict(math.e**2 - 1) == pytest.approx(0.4)
    assert model.predict(0.0) == 0
    two = DropModel().fit([math.e - 1, math.e**2 - 1], [0.1, 0.4])
    assert two.predict(math.e - 1) == pytest.approx((0.1 + 2 * 0.4) / 5)
    assert DropModel().fit([1.0], [-0.3]).predict(5.0) == 0.0


def test_three_trials_give_a_curve() -> None:
    damages = [math.expm1(x) for x in (1.0, 2.0, 3.0, 4.0)]
    model = DropModel().fit(damages, [0.1, 0.3, 0.2, 0.6])
    assert model.predict(damages[0]) == pytest.approx(0.1)
    assert model.predict(damages[1]) == model.predict(damages[2]) == pytest.approx(0.25)  # pooled
    assert model.predict(math.expm1(3.5)) == pytest.approx((0.25 + 0.6) / 2)
    assert model.predict(math.expm1(0.5)) == pytest.approx(0.05)  # the original has neither damage nor drop
    slope = (0.1 + 2 * 0.3 + 3 * 0.2 + 4 * 0.6) / 30
    assert model.predict(math.expm1(6.0)) == pytest.approx(0.6 + 2 * slope)


def test_trials_of_equal_damage_count_each() -> None:
    model = DropModel().fit([1.0, 1.0, 3.0], [0.5, 0.3, 0.1])
    assert model.predict(1.0) == model.predict(3.0) == pytest.approx(0.3)


def test_trials_without_damage_say_nothing_of_a_line() -> None:
    assert DropModel().fit([0.0], [0.2]).predict(0.4) == 0.4
    assert DropModel().fit([0.0, 0.0, 0.0], [0.2, 0.1, 0.0]).predict(0.4) == pytest.approx(0.075)


def test_trials_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="a drop for each damage"):
        DropModel().fit([1.0], [])
    with pytest.raises(ConfigError, match="finite"):
        DropModel().fit([1.0], [float("nan")])


BLOCKS = [f"b{number}" for number in range(6)]
FAMILY = Group("f", "channel", (8, 4), "b0")
SPACE = Space((*(Group(name, BLOCK, (1, 0)) for name in BLOCKS), FAMILY), ())
TABLE = DamageTable("divergence", {**{name: {1: 0.0, 0: 0.1} for name in BLOCKS}, "f": {4: 0.05}}, {("b0", "b1"): 0.02})


def measured(choice: Choice, factors: dict[str, float]) -> tuple[Choice, float]:
    """A trial of a model that keeps a fifth of what the damages, times factors, stand for."""
    truth = {name: {o: d * factors.get(name, 1.0) for o, d in row.items()} for name, row in TABLE.damages.items()}
    return choice, 0.2 * math.log1p(DamageTable("divergence", truth).predict(SPACE, choice))


def test_a_block_that_hurts_more_than_it_seemed_is_found() -> None:
    pairs = [Choice(skipped=pair) for pair in itertools.combinations(BLOCKS, 2)]
    truth = {"b1": 3.0, "b4": 0.5}
    found = adjust(TABLE, [measured(choice, truth) for choice in pairs], SPACE)
    strengths = {name: found.damages[name][0] for name in BLOCKS}
    assert max(strengths, key=strengths.__getitem__) == "b1"
    assert min(strengths, key=strengths.__getitem__) == "b4"
    assert strengths["b1"] > 1.5 * strengths["b0"]
    assert found.damages["f"] == TABLE.damages["f"]  # no trial has cut it
    assert found.measure == TABLE.measure
    assert found.pairs == {("b0", "b1"): pytest.approx(0.02 * found.damages["b0"][0] / 0.1)}
    # the tables say of new choices what would have been measured, in order
    new = [Choice(skipped=three) for three in itertools.combinations(BLOCKS, 3)]
    real = np.array([measured(choice, truth)[1] for choice in new])
    before = np.array([TABLE.predict(SPACE, choice) for choice in new])
    after = np.array([found.predict(SPACE, choice) for choice in new])
    assert np.corrcoef(after, real)[0, 1] > 0.95 > np.corrcoef(before, real)[0, 1]


def test_trials_as_expected_change_nothing() -> None:
    exact = DamageTable("divergence", TABLE.damages)
    given = [measured(Choice(skipped=(name,)), {}) for name in BLOCKS]
    found = adjust(exact, given, SPACE)
    assert all(found.damages[name][0] == pytest.approx(0.1) for name in BLOCKS)


def test_one_trial_alone_moves_a_damage_half_of_the_way() -> None:
    given = [(Choice(skipped=(name,)), 0.5 if name == "b1" else 0.005) for name in BLOCKS]
    found = adjust(TABLE, given, SPACE)
    assert found.damages["b1"][0] == pytest.approx(0.1 * (1 + 4) / 2)  # of a ratio that is far above 4
    assert found.damages["b2"][0] == pytest.approx(0.1 * (1 + 0.25) / 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sets(st.sampled_from(BLOCKS)), st.booleans(), st.floats(-1, 1)), max_size=8))
def test_damages_are_scaled_within_bounds(given: list[tuple[set[str], bool, float]]) -> None:
    asked = [(Choice(skipped=tuple(sorted(s)), widths={"f": 4} if w else {}), drop) for s, w, drop in given]
    found = adjust(TABLE, asked, SPACE)
    for name, row in TABLE.damages.items():
        for option, damage in row.items():
            assert damage * 0.25 - 1e-12 <= found.damages[name][option] <= damage * 4 + 1e-12


def test_nothing_to_learn_from_leaves_the_table() -> None:
    assert adjust(TABLE, [], SPACE) == TABLE
    assert adjust(TABLE, [(Choice(), 0.3)], SPACE) == TABLE
    assert adjust(TABLE, [(Choice(skipped=("b2",)), -0.2)], SPACE) == TABLE
    only_pairs = DamageTable("loss", {name: {0: 0.0} for name in BLOCKS} | {"f": {4: 0.0}}, {("b0", "b1"): 0.5})
    assert adjust(only_pairs, [(Choice(skipped=("b0", "b1")), 0.2)], SPACE) == only_pairs


def test_a_family_inside_a_skipped_block_has_no_share() -> None:
    trial = Choice(skipped=("b0",), widths={"f": 4})
    other = [Choice(skipped=(name,)) for name in BLOCKS[1:]]
    found = adjust(TABLE, [(trial, 0.9), *((choice, 0.1) for choice in other)], SPACE)
    assert found.damages["f"] == TABLE.damages["f"]
    assert found.damages["b0"][0] > 0.1
