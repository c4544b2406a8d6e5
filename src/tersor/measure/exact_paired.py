"""Exact one-sided test and upper bound for the accuracy drop of paired 0/1 scores.

Of n examples, `losses` were right before and wrong after, `gains` the other way round. The pair
(losses, gains) is trinomial with rates p10 and p01; the drop is δ = p10 - p01, the gain rate p01 a nuisance.

1. Tables are ordered by Tango's (1998) score limit at level α = 1 - confidence: the δ at which
   T(b, c; δ) = (b - c - nδ) / √(n(2·p̃01 + δ(1 - δ))) falls to -z(1-α); p̃01 is the constrained MLE.
2. The p-value of H0: drop >= δ is the largest probability, over the gain rate p01, of a table ordered at or
   before the observed one (exact unconditional, Lloyd & Moldovan 2008; one order for all δ, Buehler 1957).
3. The gain rate is searched only inside its exact confidence interval of level 1 - β, and β = 1e-6 is
   added back (Berger & Boos 1994).

The order does not depend on δ, so the p-value never rises with δ. Hence the upper bound is the one root of
p(δ) = α, and `upper_bound <= δ` and `p_value(δ) <= α` are the same decision. (Ordering anew for each δ
by T(·; δ) decides almost the same, but its p-value jumps up and down in δ and the two could disagree.)
The order is sharpest where p is near α; far from α the p-value is valid but larger than it could be.

Tango 1998: https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B
Lloyd & Moldovan 2008: https://doi.org/10.1002/sim.3229
Buehler 1957: https://doi.org/10.1080/01621459.1957.10501404
Lloyd & Kabaila 2003, on the optimality of Buehler bounds: https://doi.org/10.1111/1467-842X.00272
Berger & Boos 1994: https://doi.org/10.1080/01621459.1994.10476836
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, gammaln, ndtri, xlog1py, xlogy
from scipy.stats import binom

from tersor.errors import ConfigError, DataError

Array = NDArray[np.float64]

BETA = 1e-6  # Berger & Boos: the share of the error spent on the interval for the gain rate
_TAIL = 1e-12  # binomial mass left out on each side of the sum over gains; added back to the p-value
_GRID_STEP = 0.35  # distance of neighbouring gain rates on the grid, at most this many standard errors
_REFINEMENTS = 6  # each makes the grid four times finer around its best points


@dataclass(frozen=True)
class _Region:
    """The tables ordered at or before a limit, and the gain rates to be searched."""

    n: int
    gains: Array  # consecutive numbers of gains that carry almost all of the mass
    log_ways: Array  # for each of them, log of the binomial coefficient (n over gains)
    most_losses: Array  # for each of them, the most losses inside the region; -1: none
    lowest_gain_rate: float
    highest_gain_rate: float


def p_value(losses: int, gains: int, n: int, max_drop: float, confidence: float = 0.95) -> float:
    """The exact p-value of H0: the true drop is `max_drop` or more.

    p = β + sup over p01 of Σ_c Bin(c; n, p01) · BinCDF(most_losses(c); n - c, p10 / (1 - p01)),
    with p10 = p01 + max_drop. The test that rejects when p <= α errs with probability α at most, at every n.

    Args:
        losses: examples that only the reference got right.
        gains: examples that only the candidate got right.
        n: all examples, unchanged ones included.
        max_drop: the drop under test, a fraction in [-1, 1] (0.01 = one point of accuracy).
        confidence: 1 - α; it fixes the order of the tables and must be chosen before looking at the data.

    Returns:
        The p-value, in [1e-6, 1].

    Raises:
        DataError: counts are negative or do not fit into n.
        ConfigError: `max_drop` or `confidence` is out of range.

    Paper: https://doi.org/10.1002/sim.3229
    """
    _check(losses, gains, n, confidence)
    if not -1 <= max_drop <= 1:
        raise ConfigError(f"max_drop: expected a fraction in [-1, 1], got {max_drop!r}")
    return _worst(_observed_region(losses, gains, n, confidence), max_drop)


def upper_bound(losses: int, gains: int, n: int, confidence: float) -> float:
    """The exact upper confidence bound on the true drop: sup{δ : p_value(δ) > 1 - confidence}.

    Args:
        losses: examples that only the reference got right.
        gains: examples that only the candidate got right.
        n: all examples, unchanged ones included.
        confidence: probability, over samples, that the true drop is not above the bound; in (0, 1).

    Returns:
        A fraction in [-1, 1], rounded up by at most 3e-9; negative when the candidate is proven better.

    Raises:
        DataError: counts are negative or do not fit into n.
        ConfigError: `confidence` is out of range.

    Paper: https://doi.org/10.1080/01621459.1957.10501404
    """
    _check(losses, gains, n, confidence)
    region = _observed_region(losses, gains, n, confidence)

    def excess(drop: float) -> float:
        return _worst(region, drop) - (1 - confidence)

    low = high = _score_limit(losses, gains, n, confidence)
    step = (1 + 0.1 * sqrt(losses + gains)) / n
    while excess(high) > 0:
        if high >= 1:
            return 1.0
        low, high, step = high, min(high + step, 1.0), 2 * step
    while low == high or excess(low) <= 0:
        if low <= -1:
            return -1.0
        low, high, step = max(low - step, -1.0), low, 2 * step
    root = float(brentq(excess, low, high, xtol=1e-9))
    return next((bound for bound in (root, root + 1e-9, root + 3e-9) if excess(bound) <= 0), high)


def power(loss_rate: float, gain_rate: float, n: int, max_drop: float, confidence: float) -> float:
    """The probability that n examples certify a candidate with these true flip rates.

    P = Σ over the tables that certify of their trinomial probability. These tables are found with one
    limit on their order and with the gain rate searched wide around its true value, so the result may be a
    little below the power of the test, never more than 0.0002 above it.

    Args:
        loss_rate: true share of examples that only the reference gets right.
        gain_rate: true share of examples that only the candidate gets right.
        n: number of examples.
        max_drop: the budget, a fraction in [0, 1].
        confidence: of the certificate, in (0, 1).

    Returns:
        A probability.

    Raises:
        ConfigError: a rate, the budget or the confidence is out of range.

    Paper: https://doi.org/10.1002/sim.3229
    """
    _check(0, 0, n, confidence)
    check_rates(loss_rate, gain_rate)
    if not 0 <= max_drop <= 1:
        raise ConfigError(f"max_drop: expected a fraction in [0, 1], got {max_drop!r}")
    lowest = _gain_rate_interval(int(binom.ppf(1e-4, n, gain_rate)), n)[0]
    highest = _gain_rate_interval(int(binom.isf(1e-4, n, gain_rate)), n)[1]

    def region_at(limit: float) -> _Region | None:
        region = _region(limit, n, confidence, lowest, highest)
        return region if _worst(region, max_drop) <= 1 - confidence else None

    high, step = max_drop, 1 / n
    best = region_at(high)
    while best is None:  # a limit of -1 is an empty region
        if high <= -1:
            return 0.0
        high, step = max(high - step, -1.0), 2 * step
        best = region_at(high)
    low, high = high, high + step
    while high < 1 and (wider := region_at(high)) is not None:
        low, high, step, best = high, high + step, 2 * step, wider
    while high - low > 0.05 / n:
        middle = (low + high) / 2
        found = region_at(middle)
        low, high, best = (low, middle, best) if found is None else (middle, high, found)
    return float(_probability(best, np.array([gain_rate]), loss_rate - gain_rate)[0])


def check_rates(loss_rate: float, gain_rate: float) -> None:
    """Raises `ConfigError` unless both are fractions of all examples that add up to 1 at most."""
    if not (loss_rate >= 0 and gain_rate >= 0 and loss_rate + gain_rate <= 1 + 1e-12):
        raise ConfigError(
            "loss_rate, gain_rate: expected fractions of all examples that add up to 1 at most, "
            f"got {loss_rate!r} and {gain_rate!r}"
        )


def deviation_at(loss_rate: float, gain_rate: float, drop: float) -> float:
    """The standard deviation of one paired difference when the drop is forced to `drop`.

    √(2·p̃01 + drop·(1 - drop)), where p̃01 is Tango's constrained MLE at these flip rates; `drop` in [0, 1].

    Args:
        loss_rate: share of examples that only the reference gets right.
        gain_rate: share of examples that only the candidate gets right.
        drop: the forced drop, a fraction in [0, 1].

    Returns:
        A standard deviation in units of the score.

    Paper: https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C891::AID-SIM780%3E3.0.CO;2-B
    """
    rate = _constrained_gain_rate(np.array([loss_rate]), np.array([gain_rate]), 1, drop)
    return float(np.sqrt(2 * rate[0] + drop * (1 - drop)))


def _check(losses: int, gains: int, n: int, confidence: float) -> None:
    if not (n >= 1 and losses >= 0 and gains >= 0 and losses + gains <= n):
        raise DataError(
            "expected counts with losses >= 0, gains >= 0, losses + gains <= n and n >= 1, "
            f"got losses={losses!r}, gains={gains!r}, n={n!r}"
        )
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, such as 0.95, got {confidence!r}")


def _score(losses: Array, gains: Array, n: int, drop: float) -> Array:
    """Tango's score statistic T for every table; -inf or inf where its variance is zero."""
    if drop < 0:
        return -_score(gains, losses, n, -drop)
    gain_rate = _constrained_gain_rate(losses, gains, n, drop)
    numerator = losses - gains - n * drop
    deviation = np.sqrt(n * (2 * gain_rate + drop * (1 - drop)))
    at_zero = np.where(numerator == 0, 0.0, np.copysign(inf, numerator))
    return np.divide(numerator, deviation, out=at_zero, where=deviation > 0)


def _constrained_gain_rate(losses: Array, gains: Array, n: int, drop: float) -> Array:
    """Tango's MLE of p01 under p10 = p01 + drop, the larger root of a quadratic; `drop` in [0, 1]."""
    linear = (2 * n - losses + gains) * drop - losses - gains
    root = np.sqrt(linear**2 + 8 * n * gains * drop * (1 - drop))
    return np.asarray(np.maximum(root - linear, 0) / (4 * n))


def _score_limit(losses: int, gains: int, n: int, confidence: float) -> float:
    """The δ at which T falls to -z: the order of the tables, by bisection (T falls with δ)."""
    table, threshold = (np.array([float(losses)]), np.array([float(gains)])), -ndtri(confidence)
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(*table, n, middle)[0] > threshold else (low, middle)
    return high


def _gain_rate_interval(gains: int, n: int) -> tuple[float, float]:
    """The Clopper-Pearson interval of level 1 - β for the gain rate."""
    low = float(betaincinv(gains, n - gains + 1, BETA / 2)) if gains > 0 else 0.0
    high = float(betaincinv(gains + 1, n - gains, 1 - BETA / 2)) if gains < n else 1.0
    return low, high


def _observed_region(losses: int, gains: int, n: int, confidence: float) -> _Region:
    limit = _score_limit(losses, gains, n, confidence)
    region = _region(limit, n, confidence, *_gain_rate_interval(gains, n))
    observed = region.gains == gains
    region.most_losses[observed] = np.maximum(region.most_losses[observed], losses)  # whatever the rounding
    return region


def _region(limit: float, n: int, confidence: float, lowest: float, highest: float) -> _Region:
    """All tables with a score limit of at most `limit`: T(b, c; limit) <= -z, as the most b for each c."""
    first, last = int(binom.ppf(_TAIL, n, lowest)), int(binom.isf(_TAIL, n, highest))
    gains = np.arange(max(first, 0), min(last, n) + 1, dtype=np.float64)
    threshold = -ndtri(confidence) + 1e-9
    inside, outside = np.full_like(gains, -1), n - gains + 1
    while (outside - inside > 1).any():
        middle = np.floor((inside + outside) / 2)  # equals `inside` where the search has ended
        accepted = (_score(np.maximum(middle, 0), gains, n, limit) <= threshold) | (middle == inside)
        inside, outside = np.where(accepted, middle, inside), np.where(accepted, outside, middle)
    log_ways = gammaln(n + 1) - gammaln(gains + 1) - gammaln(n - gains + 1)
    return _Region(n, gains, log_ways, inside, lowest, highest)


def _probability(region: _Region, gain_rates: Array, drop: float) -> Array:
    """P(region) for every gain rate p01, with p10 = max(0, p01 + drop); left-out mass counts as inside."""
    n, gains = region.n, region.gains
    rates = gain_rates[:, None]
    weights = np.exp(region.log_ways + xlogy(gains, rates) + xlog1py(n - gains, -rates))
    row, column = np.nonzero(weights > 1e-14)
    weight, left, most = weights[row, column], n - gains[column], region.most_losses[column]
    rate = gain_rates[row]
    loss_rate = np.clip(rate + drop, 0, 1 - rate) / np.where(rate < 1, 1 - rate, 1)
    partial = (most >= 0) & (most < left)
    below = betainc(np.where(partial, left - most, 1), np.where(partial, most + 1, 1), 1 - loss_rate)
    below = np.where(partial, below, most >= 0)
    count = len(gain_rates)
    mass = np.bincount(row, weight, count)
    inside: Array = np.bincount(row, weight * below, count).astype(np.float64)
    return inside + np.maximum(1 - mass, 0)


def _worst(region: _Region, drop: float) -> float:
    """β + sup of P(region) over the gain rates: a grid, then refinement around its two best points.

    Larger drops than `drop` need no search: each c holds all b up to a limit, so fewer losses only add mass.
    Neighbours on the grid are about 0.35 standard errors (of the likelihood of p01) apart, and P(region)
    varies on the scale of one, so the grid misses no peak; after refinement the error is below 1e-7.
    """
    lowest, highest = region.lowest_gain_rate, min(region.highest_gain_rate, (1 - drop) / 2)
    if lowest > highest:
        return BETA
    fine = np.linspace(sqrt(lowest), sqrt(highest), 257) ** 2
    fine[0], fine[-1] = lowest, highest
    losses = np.maximum(fine + drop, 0)
    length = 2 * sqrt(region.n) * (np.sqrt(fine) + np.sqrt(losses) - np.sqrt(np.maximum(1 - fine - losses, 0)))
    count = 2 + ceil((length[-1] - length[0]) / _GRID_STEP)
    rates = np.interp(np.linspace(length[0], length[-1], count), length, fine)
    if lowest < -drop < highest:  # below it p10 is 0: P(region) has a kink, and often its peak, there
        rates = np.unique(np.append(rates, -drop))
    values = _probability(region, rates, drop)
    best = float(values.max())
    for _ in range(_REFINEMENTS):
        ends = np.concatenate([rates[:1], rates, rates[-1:]])
        peaks = np.argsort(values)[-2:]
        rates = np.unique(np.concatenate([np.linspace(ends[i], ends[i + 2], 9) for i in peaks]))
        values = _probability(region, rates, drop)
        best = max(best, float(values.max()))
    return min(best + BETA, 1.0)
