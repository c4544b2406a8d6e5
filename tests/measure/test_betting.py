from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tersor.errors import ConfigError, DataError
from tersor.measure import betting

differences_in_unit_range = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=80)


def hoeffding_upper_bound(differences: np.ndarray, width: float, confidence: float) -> float:
    """Hoeffding 1963: mean + 2 width √(log(1/α) / 2n), for differences in [-width, width]."""
    return float(differences.mean() + 2 * width * math.sqrt(math.log(1 / (1 - confidence)) / (2 * differences.size)))


def wealth(values: np.ndarray, mean: float, alpha: float) -> list[float]:
    """The wealth after each bet, one example at a time, as the paper writes it."""
    money, path, centre, spread = 1.0, [], 0.5, 0.25
    total, squares = 0.5, 0.25
    for seen, value in enumerate(values, start=1):
        stake = min(math.sqrt(2 * math.log(1 / alpha) / (len(values) * spread)), 0.9 / (1 - mean))
        money *= 1 - stake * (value - mean)
        path.append(money)
        total += value
        centre = total / (seen + 1)
        squares += (value - centre) ** 2
        spread = squares / (seen + 1)
    return path


def test_never_wrong_more_often_than_allowed_by_full_enumeration() -> None:
    size, alpha = 6, 0.3
    for rates in ((0.3, 0.6, 0.1), (0.05, 0.05, 0.9), (0.5, 0.5, 0.0)):
        mean, wrong = rates[0] - rates[1], 0.0
        for sample in itertools.product((0, 1, 2), repeat=size):
            probability = math.prod(rates[kind] for kind in sample)
            if probability:
                differences = np.array([1.0, -1.0, 0.0])[list(sample)]
                wrong += probability * (betting.upper_bound(differences, 0, 1, 1 - alpha) < mean - 1e-12)
        assert wrong <= alpha


def test_wealth_is_a_fair_game_and_matches_the_paper() -> None:
    rates, size, alpha = (0.2, 0.5, 0.3), 6, 0.05
    values = np.array([0.0, 0.55, 1.0])
    mean = float(np.dot(rates, values))
    expected = sum(
        math.prod(rates[kind] for kind in sample) * wealth(values[list(sample)], mean, alpha)[-1]
        for sample in itertools.product((0, 1, 2), repeat=size)
    )
    assert expected == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(differences_in_unit_range, st.integers(0, 5))
def test_bound_is_where_the_wealth_reaches_its_target(differences: list[float], seed: int) -> None:
    sample = np.array(differences)
    bound = betting.upper_bound(sample, 0, 1, 0.95, seed=seed)
    values = (np.random.default_rng(seed).permutation(sample) + 1) / 2
    if bound < 1 - 1e-9:
        assert max(wealth(values, min((bound + 1) / 2 + 1e-9, 1 - 1e-12), 0.05)) >= 20 * (1 - 1e-6)
    if bound > sample.mean() + 1e-9:
        assert max(wealth(values, (bound + 1) / 2 - 1e-7, 0.05)) < 20


@settings(max_examples=40, deadline=None)
@given(differences_in_unit_range, st.floats(0.1, 50), st.floats(-5, 5))
def test_bound_scales_with_the_score_and_ignores_its_origin(
    differences: list[float], scale: float, shift: float
) -> None:
    sample = np.array(differences)
    bound = betting.upper_bound(sample, 0, 1, 0.9)
    moved = betting.upper_bound(sample * scale, shift, shift + scale, 0.9)
    assert moved == pytest.approx(bound * scale, abs=1e-6 * scale)


@settings(max_examples=40, deadline=None)
@given(differences_in_unit_range, st.sampled_from([0.5, 0.9, 0.99]))
def test_bound_lies_between_the_mean_and_the_range(differences: list[float], confidence: float) -> None:
    sample = np.array(differences)
    bound = betting.upper_bound(sample, 0, 1, confidence)
    assert sample.mean() <= bound <= 1
    assert bound == betting.upper_bound(sample, 0, 1, confidence)  # same seed, same bound


def false_rate(samples: list[np.ndarray], mean: float) -> float:
    return float(np.mean([betting.upper_bound(sample, 0, 1, 0.95, seed=i) < mean for i, sample in enumerate(samples)]))


@pytest.mark.parametrize("kind", ["flips", "skewed", "continuous"])
def test_false_certification_when_the_drop_equals_the_budget(kind: str) -> None:
    generator, repetitions, n = np.random.default_rng(7), 600, 300
    if kind == "flips":
        samples = [generator.choice([1.0, -1.0, 0.0], n, p=[0.06, 0.04, 0.9]) for _ in range(repetitions)]
        mean = 0.02
    elif kind == "skewed":  # rare and large losses: where normal approximations break
        samples = [np.where(generator.random(n) < 0.01, 1.0, 0.0) for _ in range(repetitions)]
        mean = 0.01
    else:
        samples = [generator.beta(2, 2, n) - generator.beta(2, 2, n) for _ in range(repetitions)]
        mean = 0.0
    allowed = binom.ppf(0.999, repetitions, 0.05) / repetitions
    assert false_rate(samples, mean) <= allowed


def test_tighter_than_hoeffding_when_the_differences_vary_little() -> None:
    sample = np.random.default_rng(3).normal(0.0, 0.05, 1000)
    bound, reference = betting.upper_bound(sample, 0, 1, 0.95), hoeffding_upper_bound(sample, 1, 0.95)
    assert bound - sample.mean() < 0.1 * (reference - sample.mean())


def test_no_differences_at_all() -> None:
    bound = betting.upper_bound(np.zeros(500), 0, 1, 0.95)
    assert 1 - 0.05 ** (1 / 500) < bound < 0.01  # no method can beat 1 - α^(1/n) here
    assert betting.upper_bound(np.ones(5), 0, 1, 0.95) == pytest.approx(1)


def test_single_example() -> None:
    assert 0 <= betting.upper_bound([0.0], 0, 1, 0.95) <= 1


def test_errors() -> None:
    with pytest.raises(ConfigError, match="low, high"):
        betting.upper_bound([0.1], 1, 1, 0.95)
    with pytest.raises(ConfigError, match="confidence"):
        betting.upper_bound([0.1], 0, 1, 0)
    with pytest.raises(DataError, match=r"shape \(0,\)"):
        betting.upper_bound([], 0, 1, 0.95)
    with pytest.raises(DataError, match="full range"):
        betting.upper_bound([0.1, 1.2], 0, 1, 0.95)
    with pytest.raises(DataError, match="expected values"):
        betting.upper_bound([0.1, math.nan], 0, 1, 0.95)


def test_fast_enough() -> None:
    sample = np.random.default_rng(0).uniform(-1, 1, 10_000)
    started = time.perf_counter()
    betting.upper_bound(sample, 0, 1, 0.95)
    assert time.perf_counter() - started < 1
