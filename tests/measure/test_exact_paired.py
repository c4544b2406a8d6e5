from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import beta, binom, multinomial, norm

from tersor.errors import ConfigError, DataError
from tersor.measure import exact_paired


@st.composite
def tables(draw: st.DrawFn, largest: int = 400) -> tuple[int, int, int]:
    n = draw(st.integers(1, largest))
    losses = draw(st.integers(0, n))
    return losses, draw(st.integers(0, n - losses)), n


def most_losses(n: int, max_drop: float, confidence: float, gains: range) -> np.ndarray:
    """For each number of gains, the most losses that the test still certifies."""
    alpha, losses, limits = 1 - confidence, -1, []
    for count in gains:
        losses = min(losses, n - count)
        assert losses < 0 or exact_paired.p_value(losses, count, n, max_drop, confidence) <= alpha
        while losses < n - count:
            if exact_paired.p_value(losses + 1, count, n, max_drop, confidence) > alpha:
                break
            losses += 1
        limits.append(losses)
    return np.array(limits)


def certified_probability(n: int, gains: range, limits: np.ndarray, loss_rate: float, gain_rate: float) -> float:
    counts = np.array(gains)
    conditional = binom.cdf(limits, n - counts, min(loss_rate / (1 - gain_rate), 1))
    return float(np.sum(binom.pmf(counts, n, gain_rate) * conditional))


@pytest.mark.parametrize("n", [40, 100, 200])
@pytest.mark.parametrize("max_drop", [0.01, 0.02, 0.05, 0.1])
def test_exact_size_by_full_enumeration(n: int, max_drop: float) -> None:
    everything = range(n + 1)
    limits = most_losses(n, max_drop, 0.95, everything)
    highest = (1 - max_drop) / 2
    gain_rates = np.concatenate([np.linspace(0, 0.1, 150), np.linspace(0.1, highest, 150)])
    sizes = [certified_probability(n, everything, limits, rate + max_drop, rate) for rate in gain_rates]
    assert max(sizes) <= 0.05
    assert max(sizes) > 0.035  # not needlessly conservative


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_exact_size_at_other_levels_and_larger_drops(confidence: float) -> None:
    n, max_drop, everything = 60, 0.05, range(61)
    limits = most_losses(n, max_drop, confidence, everything)
    for drop in (0.05, 0.08, 0.2):
        for rate in np.linspace(0, (1 - drop) / 2, 60):
            assert certified_probability(n, everything, limits, rate + drop, rate) <= 1 - confidence + 1e-12


def test_power_at_2000_examples_is_computed_exactly_and_above_60_percent() -> None:
    n, rate = 2000, 0.02
    gains = range(int(binom.ppf(1e-7, n, rate)), int(binom.isf(1e-7, n, rate)) + 1)
    exact = certified_probability(n, gains, most_losses(n, 0.01, 0.95, gains), rate, rate)
    assert exact > 0.70
    assert exact - 0.01 < exact_paired.power(rate, rate, n, 0.01, 0.95) < exact + 0.0002


def brute_force_p_value(losses: int, gains: int, n: int, drop: float, confidence: float) -> float:
    """The definition, word for word: numerical MLE, every table, dense search."""

    def score(b: int, c: int, delta: float) -> float:
        def cost(rate: float) -> float:
            cells = np.clip([rate + delta, rate, 1 - delta - 2 * rate], 1e-300, 1)
            return -float(np.array([b, c, n - b - c]) @ np.log(cells))

        bounds = (max(0.0, -delta), (1 - delta) / 2)
        rate = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-11}).x
        return float((b - c - n * delta) / np.sqrt(n * (2 * rate + delta * (1 - delta))))

    def limit(b: int, c: int) -> float:
        return brentq(lambda delta: score(b, c, delta) + norm.ppf(confidence), -0.9999, 0.9999, xtol=1e-9)

    every = [(b, c) for b in range(n + 1) for c in range(n + 1 - b) if b < n]
    observed = limit(losses, gains)
    inside = np.array([(b, c, n - b - c) for b, c in every if limit(b, c) <= observed + 1e-6])
    low = beta.ppf(5e-7, gains, n - gains + 1) if gains else 0.0
    high = min(beta.isf(5e-7, gains + 1, n - gains), (1 - drop) / 2)
    rates = np.linspace(low, high, 3000)
    return max(float(multinomial.pmf(inside, n, [r + drop, r, 1 - drop - 2 * r]).sum()) for r in rates) + 1e-6


@pytest.mark.parametrize(("losses", "gains", "n", "drop"), [(1, 2, 9, 0.2), (0, 0, 8, 0.1), (3, 1, 10, 0.4)])
def test_matches_the_definition(losses: int, gains: int, n: int, drop: float) -> None:
    expected = brute_force_p_value(losses, gains, n, drop, 0.9)
    assert exact_paired.p_value(losses, gains, n, drop, 0.9) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("n", [10, 300, 3000])
def test_no_flip_gives_the_binomial_bound(n: int) -> None:
    closed_form = 1 - 0.05 ** (1 / n)  # the drop at which no flip at all has probability 0.05
    bound = exact_paired.upper_bound(0, 0, n, 0.95)
    assert closed_form <= bound + 1e-9
    assert bound <= closed_form * 1.01


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from([0.8, 0.95, 0.99]))
def test_bound_is_never_below_the_observed_drop(table: tuple[int, int, int], confidence: float) -> None:
    losses, gains, n = table
    assert (losses - gains) / n <= exact_paired.upper_bound(losses, gains, n, confidence) <= 1


@settings(max_examples=40, deadline=None)
@given(tables())
def test_one_more_loss_raises_and_one_more_gain_lowers_the_bound(table: tuple[int, int, int]) -> None:
    losses, gains, n = table
    bound = exact_paired.upper_bound(losses, gains, n, 0.95)
    if losses + gains < n:
        assert exact_paired.upper_bound(losses + 1, gains, n, 0.95) >= bound - 1e-8
        assert exact_paired.upper_bound(losses, gains + 1, n, 0.95) <= bound + 1e-8
    if losses:
        assert exact_paired.upper_bound(losses - 1, gains, n, 0.95) <= bound + 1e-8


@settings(max_examples=40, deadline=None)
@example((0, 58, 144), 0.0, 0.8)  # its peak is the kink at p10 = 0
@given(tables(), st.floats(-1, 0.999), st.sampled_from([0.8, 0.95, 0.99]))
def test_p_value_and_bound_decide_alike(table: tuple[int, int, int], drop: float, confidence: float) -> None:
    bound = exact_paired.upper_bound(*table, confidence)
    for at in (drop, min(bound + 1e-8, 1), max(bound - 1e-8, -1), bound):
        if at < 1 and (at == bound or abs(at - bound) > 5e-9):
            assert (exact_paired.p_value(*table, at, confidence) <= 1 - confidence) == (bound <= at)


@settings(max_examples=40, deadline=None)
@given(tables(), st.floats(-1, 1), st.floats(-1, 1))
def test_p_value_never_rises_with_the_drop(table: tuple[int, int, int], first: float, second: float) -> None:
    low, high = sorted((first, second))
    at_low, at_high = (exact_paired.p_value(*table, drop) for drop in (low, high))
    assert 0 < at_high <= at_low + 1e-6 <= 1 + 1e-6


@pytest.mark.parametrize("n", [7, 40])
def test_score_is_monotone_in_losses_gains_and_drop(n: int) -> None:
    losses, gains = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0), indexing="ij")
    possible = np.where(losses + gains <= n, 1, np.nan)
    drops = np.linspace(-0.999, 0.999, 201)
    scores = np.stack([exact_paired._score(losses, gains, n, float(drop)) * possible for drop in drops])
    steps = [np.diff(scores, axis=0), -np.diff(scores, axis=1), np.diff(scores, axis=2)]
    assert all((step[np.isfinite(step)] <= 1e-9).all() for step in steps)


@pytest.mark.parametrize("seed", range(4))
def test_search_over_gain_rates_misses_no_peak(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.choice([30, 300, 2000]))
    losses, gains = (int(count) for count in generator.binomial(n, generator.choice([0.01, 0.1, 0.3], 2)))
    region = exact_paired._observed_region(losses, gains, n, 0.95)
    for drop in (0.01, (losses - gains) / n + 0.02):
        dense = np.linspace(region.lowest_gain_rate, min(region.highest_gain_rate, (1 - drop) / 2), 3000)
        best = exact_paired._probability(region, dense, drop).max() + exact_paired.BETA
        assert exact_paired._worst(region, drop) >= best - 1e-7


def test_edges() -> None:
    assert exact_paired.upper_bound(1, 0, 1, 0.95) == 1
    assert exact_paired.upper_bound(25, 0, 25, 0.95) == 1
    assert exact_paired.upper_bound(0, 0, 1, 0.95) == pytest.approx(0.95, abs=1e-5)
    assert exact_paired.p_value(25, 0, 25, 1.0) == 1
    assert exact_paired.p_value(24, 0, 25, 1.0) == pytest.approx(1e-6)
    assert exact_paired.p_value(0, 0, 500, 0.0) == 1
    assert exact_paired.upper_bound(0, 50, 50, 0.95) == pytest.approx(1 - 2 * 0.05 ** (1 / 50), abs=1e-4)
    assert exact_paired.upper_bound(3, 3, 100, 1 - 1e-7) == 1  # beyond the share kept for the nuisance
    assert exact_paired.p_value(200_000, 200_000, 1_000_000, 0.01) < 1e-5
    assert exact_paired.power(0.0, 0.0, 298, 0.01, 0.95) == 0
    assert exact_paired.power(0.0, 0.0, 299, 0.01, 0.95) == pytest.approx(1)
    assert exact_paired.power(0.3, 0.0, 50, 0.0, 0.95) < 0.05


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts(counts: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="losses"):
        exact_paired.upper_bound(*counts, 0.95)


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="confidence"):
        exact_paired.upper_bound(1, 1, 5, 1.0)
    with pytest.raises(ConfigError, match="max_drop"):
        exact_paired.p_value(1, 1, 5, 1.5)
    with pytest.raises(ConfigError, match="max_drop"):
        exact_paired.power(0.1, 0.1, 5, -0.1, 0.95)
    with pytest.raises(ConfigError, match="loss_rate"):
        exact_paired.power(0.7, 0.4, 5, 0.1, 0.95)


def test_fast_enough() -> None:
    def seconds(n: int, call: str) -> float:
        started = time.perf_counter()
        if call == "p_value":
            exact_paired.p_value(n // 50, n // 50, n, 0.01)
        else:
            exact_paired.upper_bound(n // 50, n // 50, n, 0.95)
        return time.perf_counter() - started

    assert min(seconds(2000, "p_value") for _ in range(3)) < 0.1
    assert min(seconds(10_000, "upper_bound") for _ in range(3)) < 1
