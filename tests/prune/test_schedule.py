from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import ConfigError
from tersor.prune import SparsitySchedule
from tersor.prune.schedule import cubic, iterative


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 30), st.sampled_from(["equal", "geometric"]))
def test_rounds_rise_from_start_to_end(one: float, other: float, rounds: int, spacing: Any) -> None:
    initial, final = sorted((one, other))
    path = iterative(final, rounds, initial=initial, spacing=spacing)
    assert len(path) == rounds
    assert path[-1] == final
    assert all(low <= high + 1e-12 for low, high in zip((initial, *path), path, strict=False))


def test_spacings_do_what_they_say() -> None:
    assert iterative(0.8, 4, spacing="equal") == pytest.approx((0.2, 0.4, 0.6, 0.8))
    assert iterative(1 - 0.8**3, 3) == pytest.approx((0.2, 0.36, 0.488))  # a fifth of what is left, thrice


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_the_cubic_rises_and_slows_down(one: float, other: float, final: float) -> None:
    early, late = sorted((one, other))
    assert 0 <= cubic(early, final) <= cubic(late, final) + 1e-12 <= final + 2e-12
    assert cubic(0, final, initial=final / 2) == pytest.approx(final / 2)
    assert cubic(1, final) == final
    assert cubic(0.5, 0.8) == pytest.approx(0.8 - 0.8 / 8)


@given(
    st.sampled_from(["cubic", "iterative", "one_shot"]),
    st.floats(0, 0.99),
    st.integers(1, 500),
    st.integers(1, 50),
    st.integers(1, 9),
)
def test_a_plan_is_rising_inside_training_and_ends_exactly(
    curve: Any, sparsity: float, steps: int, frequency: int, rounds: int
) -> None:
    schedule = SparsitySchedule(curve=curve, begin=0.25, end=0.75, frequency=frequency, rounds=rounds)
    plan = schedule.plan(sparsity, steps)
    moments, amounts = list(plan), list(plan.values())
    assert moments == sorted(moments)
    assert amounts == sorted(amounts)
    assert amounts[-1] == sparsity
    assert round(0.25 * steps) == moments[0]
    assert moments[-1] <= steps
    if curve == "cubic":
        assert all(later - earlier <= frequency for earlier, later in pairwise(moments))


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="begin must not be after end"):
        SparsitySchedule(begin=0.8, end=0.5)
    with pytest.raises(ConfigError, match="initial sparsity"):
        iterative(0.3, 2, initial=0.5)
    with pytest.raises(ConfigError, match="rounds"):
        iterative(0.3, 0)
