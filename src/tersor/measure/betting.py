"""A one-sided upper confidence bound on the mean paired difference of bounded scores, by betting.

A gambler who doubts that the mean is as high as m bets on every example, in random order, and holds

    K_t(m) = Π_{i<=t} (1 - λ_i(m) · (x_i - m)),    λ_i(m) = min(λ_i, 0.9 / (1 - m)),

where x_i is the difference rescaled to [0, 1] and λ_i = √(2 log(1/α) / (n·σ̂²_{i-1})) uses only the examples
before i (predictable plug-in). If m is the true mean, K_t(m) is a nonnegative martingale, so by Ville's
inequality it ever reaches 1/α with probability α at most. The bound is the smallest m that is refuted at
some time; each factor never falls with m, so that root is unique.

Waudby-Smith & Ramdas 2024: https://doi.org/10.1093/jrsssb/qkad009
"""

from __future__ import annotations

from math import isfinite, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.errors import ConfigError, DataError

_LARGEST_LOSS = 0.9  # share of the wealth that one example can cost
_BISECTIONS = 50


def upper_bound(differences: ArrayLike, low: float, high: float, confidence: float, seed: int = 0) -> float:
    """The betting upper confidence bound on the mean of paired differences.

    bound = min{m : max_t K_t(m) >= 1 / (1 - confidence)}. It holds for every distribution on the declared
    range and for every number of independent examples; the order of the bets is a seeded shuffle.

    Args:
        differences: reference score - candidate score for each example, in units of the metric.
        low: the smallest value that a score can take.
        high: the largest value that a score can take; a difference lies in [-(high - low), high - low].
        confidence: probability, over samples, that the true mean is not above the bound; in (0, 1).
        seed: of the shuffle; fix it before looking at the data.

    Returns:
        A number in [-(high - low), high - low], never below the observed mean.

    Raises:
        ConfigError: `low` is not below `high`, or `confidence` is out of range.
        DataError: no difference, not one-dimensional, or one is outside the range or not finite.

    Paper: https://doi.org/10.1093/jrsssb/qkad009
    """
    if not (isfinite(low) and isfinite(high) and low < high):
        raise ConfigError(f"low, high: expected finite numbers with low < high, got {low!r} and {high!r}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, such as 0.95, got {confidence!r}")
    values, width = np.asarray(differences, dtype=np.float64), high - low
    if values.ndim != 1 or values.size == 0:
        raise DataError(f"differences: expected one per example, at least one, got shape {values.shape}")
    if not (np.abs(values) <= width * (1 + 1e-9)).all():
        raise DataError(
            f"differences: expected values in [{-width}, {width}] for scores in [{low}, {high}], "
            f"got {values.min()} to {values.max()}; declare the full range of the score"
        )
    shuffled = np.random.default_rng(seed).permutation(values)
    bound = _refuted_mean(np.clip((shuffled + width) / (2 * width), 0, 1), 1 - confidence)
    return float(max(width * (2 * bound - 1), values.mean()))


def _refuted_mean(values: NDArray[np.float64], alpha: float) -> float:
    """The smallest mean in [0, 1] that the bets refute, rounded up."""
    bets, target = _bets(values, alpha), log(1 / alpha)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        stakes = np.minimum(bets, _LARGEST_LOSS / (1 - middle))
        wealth = np.cumsum(np.log1p(-stakes * (values - middle)))
        low, high = (low, middle) if wealth.max() >= target else (middle, high)
    return high


def _bets(values: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """λ_i from the examples before i: running mean and variance, started at 1/2 and 1/4."""
    count = np.arange(1, values.size + 1)
    mean = (0.5 + np.cumsum(values)) / (count + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.sqrt(2 * log(1 / alpha) / (values.size * before))
