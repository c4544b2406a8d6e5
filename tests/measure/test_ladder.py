"""The ladder: an order fixed beforehand, tests until the first failure, errors no more often than promised."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.certificate import Certificate
from tersor.errors import ConfigError, DataError, NonFiniteError, SplitTooSmallError
from tersor.measure import certify, exact_paired
from tersor.measure.ladder import Contender, chosen, climb, order, reachable
from tersor.measure.ledger import level_of

N, BUDGET, LEVEL = 400, 0.02, level_of(0.95, 1)


def a_certificate(bound: float, confidence: float = LEVEL, **more: Any) -> Certificate:
    return Certificate(
        max_drop=BUDGET, confidence=confidence, drop=bound / 2, upper_bound=bound, n=N, method="exact-paired",
        certified=bound <= BUDGET, exact=True, **more,
    )  # fmt: skip


def climbed(bounds: list[float]) -> Any:
    contenders = [Contender(number, 10.0 - number, 0.001 * number, bound) for number, bound in enumerate(bounds)]
    return climb(
        contenders, lambda contender: a_certificate(contender.search_bound),
        confidence=0.95, level=LEVEL, times_asked=1,
    )  # fmt: skip


@st.composite
def contenders(draw: st.DrawFn) -> list[Contender]:
    few = st.integers(0, 6)
    rows = draw(st.lists(st.tuples(few, few, few), max_size=12))
    return [Contender(number, 1.0 + a, b / 100, c / 50) for number, (a, b, c) in enumerate(rows)]


# --- order


@given(contenders(), st.randoms())
def test_every_step_gains_speed_and_takes_risk(everyone: list[Contender], random: Any) -> None:
    ladder = order(everyone)
    assert bool(ladder) == bool(everyone)
    for before, after in itertools.pairwise(ladder):
        assert after.latency_ms < before.latency_ms
        assert after.search_bound > before.search_bound
    left_out = [contender for contender in everyone if contender not in ladder]
    for contender in left_out:
        assert any(
            other.latency_ms <= contender.latency_ms and other.search_bound <= contender.search_bound
            for other in ladder
        )
    shuffled = list(everyone)
    random.shuffle(shuffled)
    assert order(shuffled) == ladder


def test_a_dominated_contender_is_never_tested() -> None:
    safe, fast = Contender(1, 9.0, 0.001, 0.008), Contender(2, 3.0, 0.01, 0.02)
    slower, surer = Contender(3, 9.5, 0.002, 0.009), Contender(4, 3.5, 0.012, 0.019)
    unsure = Contender(5, 4.0, 0.009, 0.03)  # loses less than faster ones, but they are surer
    assert order([fast, slower, safe, unsure, surer]) == [safe, surer, fast]
    assert order([fast, Contender(6, 3.0, 0.009, 0.02)]) == [Contender(6, 3.0, 0.009, 0.02)]


@pytest.mark.parametrize(
    "wrong", [{"latency_ms": math.nan}, {"latency_ms": math.inf}, {"search_drop": math.nan}, {"search_bound": math.nan}]
)
def test_contenders_without_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(NonFiniteError, match="trial 7"):
        Contender(**{"trial": 7, "latency_ms": 1.0, "search_drop": 0.0, "search_bound": 0.0, **wrong})


def test_an_unbounded_contender_comes_last() -> None:
    unbounded, safe = Contender(0, 1.0, 0.5, math.inf), Contender(1, 2.0, 0.1, 0.2)
    assert order([unbounded, safe]) == [safe, unbounded]


def test_one_number_for_two_contenders_is_refused() -> None:
    with pytest.raises(DataError, match=r"got \[3\]"):
        order([Contender(3, 1.0, 0.0, 0.0), Contender(3, 2.0, 0.1, 0.0), Contender(4, 2.0, 0.1, 0.0)])


# --- climb


def test_it_ends_at_the_first_failure() -> None:
    ladder = climbed([0.01, 0.02, 0.021, 0.005, 0.001])
    assert [step.certified for step in ladder.steps] == [True, True, False]
    assert [step.trial for step in ladder.steps] == [0, 1, 2]
    assert ladder.untested == [3, 4]
    assert (ladder.confidence, ladder.spent, ladder.times_asked) == (0.95, LEVEL, 1)
    assert (ladder.steps[2].certify_drop, ladder.steps[2].upper_bound) == (0.0105, 0.021)
    assert chosen(ladder) == 1


def test_all_may_pass_and_none() -> None:
    every, none, nobody = climbed([0.01, 0.011, 0.012]), climbed([0.03, 0.001]), climbed([])
    assert (chosen(every), every.untested) == (2, [])
    assert (chosen(none), none.untested) == (None, [1])
    assert (len(none.steps), none.steps[0].certified) == (1, False)
    assert (chosen(nobody), nobody.steps) == (None, [])


def test_certificates_that_promise_less_are_refused() -> None:
    rung = [Contender(4, 1.0, 0.0, 0.01)]
    told = {"confidence": 0.95, "level": LEVEL, "times_asked": 1}
    with pytest.raises(ConfigError, match=r"trial 4.*got one at 0.95"):
        climb(rung, lambda _: a_certificate(0.01, 0.95), **told)
    assert chosen(climb(rung, lambda _: a_certificate(0.01, 0.95, level=LEVEL), **told)) == 4
    for confidence, level in ((0.95, 0.94), (0.95, 1.0), (0.0, 0.9)):
        with pytest.raises(ConfigError, match="confidence <= level"):
            climb(rung, lambda _: a_certificate(0.01), confidence=confidence, level=level, times_asked=1)


def test_the_certificate_that_failed_tells_how_much_data_would_do() -> None:
    reference, candidate = np.ones(N), np.ones(N)
    candidate[:12], reference[12:20] = 0, 0
    seen = []

    def test(_: Contender) -> Certificate:
        seen.append(certify(reference, candidate, max_drop=BUDGET, confidence=LEVEL))
        return seen[-1]

    ladder = climb([Contender(0, 1.0, 0.0, 0.0)], test, confidence=0.95, level=LEVEL, times_asked=1)
    assert chosen(ladder) is None
    assert seen[0].examples_needed > N


# --- the promise


@cache
def answer(losses: int, gains: int) -> Certificate:
    passed = exact_paired.p_value(losses, gains, N, BUDGET, LEVEL) <= 1 - LEVEL  # as `certify` decides, but quicker
    return a_certificate(BUDGET if passed else 1.0)


def simulate(rates: list[tuple[float, float]], splits: int, *, shared: bool) -> tuple[float, float]:
    """How often the chosen one is over the budget: of the ladder, and of the fastest of all that pass.

    The contenders of `rates` (losses, gains), the slowest first, lose on the same examples (nested) or on their own.
    """
    generator = np.random.default_rng(7)
    drops = [losses - gains for losses, gains in rates]
    rungs = [Contender(number, 10.0 - number, drop, drop) for number, drop in enumerate(drops)]
    ladder_errs = greedy_errs = 0
    for _ in range(splits):
        draws = np.tile(generator.random(N), (len(rates), 1)) if shared else generator.random((len(rates), N))
        found = [
            answer(int((draw < losses).sum()), int((draw > 1 - gains).sum()))
            for draw, (losses, gains) in zip(draws, rates, strict=True)
        ]
        ladder = climb(rungs, lambda rung, f=found: f[rung.trial], confidence=0.95, level=LEVEL, times_asked=1)
        best = chosen(ladder)
        ladder_errs += best is not None and drops[best] >= BUDGET
        passed = [number for number, certificate in enumerate(found) if certificate.certified]
        greedy_errs += bool(passed) and drops[passed[-1]] >= BUDGET
    return ladder_errs / splits, greedy_errs / splits


@pytest.mark.parametrize("shared", [True, False])
def test_the_chosen_one_is_over_the_budget_no_more_often_than_promised(shared: bool) -> None:
    safe, over = [(0.0, 0.0), (0.001, 0.01)], [(0.03, 0.01), (0.021, 0.0), (0.025, 0.004), (0.022, 0.0), (0.024, 0.0)]
    splits, alpha = 2000, 1 - LEVEL
    ladder, greedy = simulate(safe + over, splits, shared=shared)
    assert ladder <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / splits)
    if not shared:
        assert ladder > 0  # the case is hard enough to err at all
        assert greedy > 2 * alpha  # and the order is what keeps the promise


# --- reachable


@pytest.mark.parametrize(("n", "max_drop", "flips"), [(600, 0.03, 0.05), (1000, 0.02, 0.04), (600, 0.05, 0.01)])
def test_what_is_reachable_is_certified_as_often_as_wanted(n: int, max_drop: float, flips: float) -> None:
    drop = reachable(n, max_drop, confidence=LEVEL, flip_rate=flips)
    assert drop < max_drop
    all_flips = max(flips, abs(drop))
    generator = np.random.default_rng(3)

    @cache
    def passes(losses: int, gains: int) -> bool:
        return exact_paired.p_value(losses, gains, n, max_drop, LEVEL) <= 1 - LEVEL

    def share(drop: float) -> float:
        rates = [(all_flips + drop) / 2, (all_flips - drop) / 2, 1 - all_flips]
        return float(np.mean([passes(int(b), int(c)) for b, c, _ in generator.multinomial(n, rates, size=3000)]))

    assert share(drop) == pytest.approx(0.8, abs=0.03)  # 4 standard errors, and 1 % of the budget
    assert share(drop - 0.3 * (max_drop - drop)) > 0.85


def test_more_examples_and_looser_budgets_reach_further() -> None:
    reached = [reachable(n, 0.02) for n in (400, 800, 10_000, 10_001, 100_000)]
    assert reached == sorted(reached)
    assert reached[3] == pytest.approx(reached[2], abs=0.0005)  # the formula joins the exact power
    assert reached[0] < 0 < reached[4] < 0.02
    assert reachable(800, 0.01) < reached[1] < reachable(800, 0.02, flip_rate=0.01)
    assert reachable(800, 0.02, confidence=0.999) < reached[1]


def test_drops_beyond_the_flip_rate_flip_more() -> None:
    assert 0.01 < reachable(3000, 0.05, flip_rate=0.01) < 0.05


def test_what_nothing_reaches_is_said() -> None:
    with pytest.raises(SplitTooSmallError, match="20 examples cannot certify"):
        reachable(20, 0.01)
    with pytest.raises(SplitTooSmallError, match="cannot certify"):
        reachable(500, 0.01, confidence=level_of(0.95, 6))


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"max_drop": -0.1}, {"confidence": 1.0}, {"flip_rate": 0.0}, {"power": 1.0}]
)
def test_reachable_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected n >= 1"):
        reachable(**{"n": 500, "max_drop": 0.02, **wrong})
