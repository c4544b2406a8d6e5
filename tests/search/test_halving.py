"""How long rungs train, and who goes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.search import Choice, TrialRecord
from tersor.search.halving import FALL, RUNGS, fall, final_drop, promoted, steps_on, trials_on


def trial(number: int, *, drop: float, ms: float = 1.0, rung: int = 0, name: str = "a") -> TrialRecord:
    choice = Choice(skipped=(name,))
    return TrialRecord(
        number=number, choice=choice, rung=rung, source="program", status="finished", drop=drop, latency_ms=ms
    )


def test_one_in_eta_goes_on_and_at_least_as_many_as_shall_end() -> None:
    counts = [trials_on(rung, trials=8, eta=4, finalists=2) for rung in range(RUNGS)]
    assert counts == [8, 2, 2]
    assert [trials_on(rung, trials=9, eta=3, finalists=1) for rung in range(RUNGS)] == [9, 3, 1]


@given(
    seconds=st.floats(100, 1e5),
    per_step=st.floats(0.01, 2),
    trials=st.integers(1, 20),
    eta=st.integers(2, 5),
    finalists=st.integers(1, 3),
)
def test_all_trainings_together_take_the_time(
    seconds: float, per_step: float, trials: int, eta: int, finalists: int
) -> None:
    shape = {"trials": trials, "eta": eta, "finalists": finalists}
    steps = [steps_on(rung, seconds=seconds, seconds_per_step=per_step, **shape) for rung in range(RUNGS)]
    counts = [trials_on(rung, **shape) for rung in range(RUNGS)]
    total = sum(count * step for count, step in zip(counts, steps, strict=True)) * per_step
    rounded_up = sum(count for count, step in zip(counts, steps, strict=True) if step == 1)  # a step is the least
    assert total <= seconds * (1 + 1e-9) + rounded_up * per_step
    assert steps == sorted(steps)


def test_how_drops_fall_is_learned_from_trials_on_two_rungs() -> None:
    assert fall([trial(0, drop=0.1)]) == FALL
    both = [trial(0, drop=0.1), trial(1, drop=0.04, rung=1), trial(2, drop=0.2, name="b")]
    assert fall(both) == pytest.approx(0.4)
    assert final_drop(both[2], 0.4) == pytest.approx(0.2 * 0.4**2)
    assert final_drop(both[1], 0.4) == pytest.approx(0.04 * 0.4)


def test_nothing_is_expected_of_a_model_that_is_not_trained() -> None:
    whole = TrialRecord(number=0, choice=Choice(format="int8"), rung=0, source="preset", status="finished", drop=0.01)
    assert final_drop(whole, 0.5) == 0.01


def test_the_fastest_inside_the_aim_goes_on_then_the_nearest_outside() -> None:
    records = [trial(n, drop=0.0, ms=ms, name=str(n)) for n, ms in enumerate([3.0, 2.0, 1.0, 0.5])]
    predicted = {0: 0.001, 1: 0.009, 2: 0.05, 3: 0.02}
    assert [r.number for r in promoted(records, predicted, aim=0.01, count=4)] == [1, 3, 2, 0]
