"""The face of the accuracy-drop certificate: scores go in, a `Certificate` comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil, inf, isfinite, log, log1p, sqrt
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tersor.core.certificate import Certificate, Method
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.measure import betting, exact_paired

Array = NDArray[np.float64]

_MEAN_RESAMPLES = 9_999
RESAMPLED_UP_TO = 0.9999  # confidence; so many resamples do not tell more
_BCA_UP_TO = 10_000  # examples; beyond, the correction is below the noise and its jackknife costs n² work
_BATCH_VALUES = 2**21  # values in memory at once while resampling
EXACT_POWER_UP_TO = 10_000  # examples; beyond, the normal formula is within a few per cent


def certify(
    reference_scores: Any,
    candidate_scores: Any,
    *,
    max_drop: float,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
    agreement: bool = False,
    seed: int = 0,
) -> Certificate:
    """Bounds the true mean drop, reference score - candidate score, from above.

    certified = (upper_bound <= max_drop), with P(true drop <= upper_bound) >= confidence. The method follows
    from the scores: all 0 or 1 → 'exact-paired'; the same with `agreement` → 'clopper-pearson';
    other scores with `bounds` → 'betting'; without → 'paired-bootstrap', which is only approximate.
    Bounds other than (0, 1) say that other values are possible, so they always lead to 'betting'.

    Args:
        reference_scores: one score per example of the reference, higher is better; array, list or tensor.
        candidate_scores: the same examples in the same order, scored for the candidate.
        max_drop: the budget, in units of the score (0.01 = one point of accuracy).
        confidence: in (0, 1).
        bounds: smallest and largest value the score can ever take, not only those that were seen.
        agreement: the score is "same answer as the reference", so every reference score is 1 by construction.
        seed: of the order of the bets, or of the bootstrap.

    Returns:
        The certificate; `examples_needed` is filled for 0/1 scores that did not certify.

    Raises:
        DataError: lengths differ, no scores, not one-dimensional, or a score outside its bounds.
        NonFiniteError: a score is NaN or infinite.
        ConfigError: `max_drop`, `confidence` or `bounds` is out of range.

    Papers: https://doi.org/10.1002/sim.3229 (exact), https://doi.org/10.1093/jrsssb/qkad009 (betting)
    """
    _check_budget(max_drop, confidence)
    reference = _scores(reference_scores, "reference_scores")
    candidate = _scores(candidate_scores, "candidate_scores")
    _check_lengths(reference_scores=reference.size, candidate_scores=candidate.size)
    if bounds is not None:
        _check_bounds(reference, "reference_scores", bounds)
        _check_bounds(candidate, "candidate_scores", bounds)
    binary = bool((((reference == 0) | (reference == 1)) & ((candidate == 0) | (candidate == 1))).all())
    if agreement:
        _check_agreement(reference, binary)
    if agreement or (binary and (bounds is None or tuple(bounds) == (0, 1))):
        return _certify_binary(reference, candidate, max_drop, confidence, agreement)
    differences = reference - candidate
    method: Method = "paired-bootstrap" if bounds is None else "betting"
    if bounds is None:
        bound = _bootstrap_bound(differences, confidence, seed)
    else:
        bound = betting.upper_bound(differences, bounds[0], bounds[1], confidence, seed)
    drop = float(differences.mean())
    return _certificate(max_drop, confidence, drop, bound, differences.size, method, exact=method == "betting")


def certify_metric(
    metric: Callable[[Any, Any], float],
    reference_outputs: Any,
    candidate_outputs: Any,
    labels: Any,
    *,
    max_drop: float,
    confidence: float = 0.95,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = 1000,
) -> Certificate:
    """Bounds the drop of a metric that has no score per example (F1, AUC), approximately.

    A paired percentile bootstrap: examples are drawn with replacement, the same for both models, and the
    bound is the ⌈(resamples + 1) · confidence⌉-th smallest of the drops. No finite-sample guarantee.

    Args:
        metric: called as `metric(outputs, labels)` with arrays or tensors of chosen examples.
        reference_outputs: first dimension = examples; array, list or tensor.
        candidate_outputs: the same examples in the same order.
        labels: one per example, in the same order.
        max_drop: the budget, in units of the metric.
        confidence: in (0, 1).
        higher_is_better: False turns the sign of the drop, for error metrics.
        seed: of the draws.
        resamples: number of draws; the metric is called twice for each.

    Returns:
        A certificate with method 'paired-bootstrap' and exact=False.

    Raises:
        DataError: lengths differ, or fewer than two examples.
        NonFiniteError: the metric is NaN or infinite on all examples or on a draw.
        ConfigError: `max_drop`, `confidence` or `resamples` is out of range.

    Paper: Efron 1979, https://doi.org/10.1214/aos/1176344552
    """
    _check_budget(max_drop, confidence)
    rank = ceil((resamples + 1) * confidence - 1e-9)
    if rank > resamples:
        raise ConfigError(
            f"resamples: expected at least {ceil(confidence / (1 - confidence) - 1e-9)} for "
            f"confidence={confidence}, got {resamples}"
        )
    reference, candidate, truth = (
        values if hasattr(values, "shape") else np.asarray(values)
        for values in (reference_outputs, candidate_outputs, labels)
    )
    n = len(truth)
    _check_lengths(reference_outputs=len(reference), candidate_outputs=len(candidate), labels=n)
    if n < 2:
        raise DataError(f"labels: expected at least 2 examples to resample, got {n}")

    def drop(chosen: NDArray[np.int64], where: str) -> float:
        before = float(metric(reference[chosen], truth[chosen]))
        after = float(metric(candidate[chosen], truth[chosen]))
        if not (isfinite(before) and isfinite(after)):
            raise NonFiniteError(
                f"metric: expected finite numbers, got {before} (reference) and {after} (candidate) "
                f"on {where}; define the metric for examples that lack a class, or use more examples"
            )
        return before - after if higher_is_better else after - before

    generator = np.random.default_rng(seed)
    observed = drop(np.arange(n), "all examples")
    drops = [drop(generator.integers(0, n, n), f"bootstrap draw {i} of {resamples}") for i in range(resamples)]
    bound = float(np.sort(drops)[rank - 1])
    return _certificate(max_drop, confidence, observed, bound, n, "paired-bootstrap", exact=False)


def examples_needed(
    loss_rate: float, gain_rate: float, *, max_drop: float, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """The number of examples at which the exact test certifies with probability `power`.

    Starts at n = ((z_confidence·s0 + z_power·s1) / (max_drop - drop))², s1² = loss_rate + gain_rate - drop²,
    s0² the same under the budget, and corrects it by the exact power to within 0.5 %. Power moves in small
    teeth with n, so a slightly smaller n may do too; above 10,000 examples the formula alone is the answer.

    Args:
        loss_rate: true share of examples that only the reference gets right.
        gain_rate: true share of examples that only the candidate gets right.
        max_drop: the budget, a fraction in [0, 1].
        confidence: of the certificate, in (0, 1).
        power: wanted probability that the certificate succeeds, in (0, 1).

    Returns:
        A number of examples; None when the true drop is not inside the budget.

    Raises:
        ConfigError: a rate, the budget, the confidence or the power is out of range.

    Paper: https://doi.org/10.1002/sim.3229
    """
    _check_budget(max_drop, confidence, largest=1)
    exact_paired.check_rates(loss_rate, gain_rate)
    if not 0 < power < 1:
        raise ConfigError(f"power: expected a number between 0 and 1, such as 0.8, got {power!r}")
    drop = loss_rate - gain_rate
    if drop >= max_drop:
        return None
    if loss_rate + gain_rate == 0 or max_drop >= 1:
        return smallest_certifiable(max_drop, confidence)
    margin = normal_margin(loss_rate, gain_rate, max_drop=max_drop, confidence=confidence, power=power)
    guess = max(ceil((max(margin, 0) / (max_drop - drop)) ** 2), 1)
    if guess > EXACT_POWER_UP_TO:
        return guess

    def enough(n: int) -> bool:
        return bool(exact_paired.power(loss_rate, gain_rate, n, max_drop, confidence) >= power)

    low = high = guess
    if enough(guess):
        while low >= 1 and (low == high or enough(low)):
            low, high = low - max(1, low // 50), low
    else:
        while low == high or not enough(high):
            low, high = high, high + max(1, high // 50)
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def normal_margin(loss_rate: float, gain_rate: float, *, max_drop: float, confidence: float, power: float) -> float:
    """√n times the distance that n examples need between the true drop and the budget, by the normal distribution."""
    deviation = sqrt(loss_rate + gain_rate - (loss_rate - gain_rate) ** 2)
    at_budget = exact_paired.deviation_at(loss_rate, gain_rate, max_drop)
    return float(stats.norm.ppf(confidence) * at_budget + stats.norm.ppf(power) * deviation)


def smallest_certifiable(max_drop: float, confidence: float) -> int:
    """The smallest number of 0/1 examples at which a candidate without any flip is certified.

    n is close to log(1 - confidence) / log(1 - max_drop): 299 for one point at 95 %.

    Args:
        max_drop: the budget, a fraction in (0, 1].
        confidence: in (0, 1 - 1e-6).

    Returns:
        A number of examples.

    Raises:
        ConfigError: no number of examples could certify this budget at this confidence.
    """
    _check_budget(max_drop, confidence, largest=1)
    if max_drop == 0 or 1 - confidence <= exact_paired.BETA:
        raise ConfigError(
            "max_drop, confidence: expected max_drop above 0 and confidence below 0.999999, got "
            f"max_drop={max_drop} and confidence={confidence}; no number of examples could certify this"
        )
    if max_drop >= 1:
        return 1

    def enough(n: int) -> bool:
        return exact_paired.p_value(0, 0, n, max_drop, confidence) <= 1 - confidence

    low = max(ceil(log(1 - confidence) / log1p(-max_drop)) - 1, 0)  # too few: no flip is likelier than 1 - confidence
    step, high = 1, low + 1
    while not enough(high):
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _certify_binary(
    reference: Array, candidate: Array, max_drop: float, confidence: float, agreement: bool
) -> Certificate:
    _check_budget(max_drop, confidence, largest=1)
    n, losses, gains = reference.size, int((reference > candidate).sum()), int((candidate > reference).sum())
    method: Method = "clopper-pearson" if agreement else "exact-paired"
    if agreement:
        interval = stats.binomtest(losses, n, alternative="less").proportion_ci(confidence, method="exact")
        bound = float(interval.high)
    else:
        bound = exact_paired.upper_bound(losses, gains, n, confidence)
    needed = None
    if bound > max_drop and 1 - confidence > exact_paired.BETA:
        needed = examples_needed(losses / n, gains / n, max_drop=max_drop, confidence=confidence)
    counts = {"losses": losses, "gains": gains, "examples_needed": needed}
    drop, measures = (losses - gains) / n, "agreement" if agreement else "metric"
    return _certificate(max_drop, confidence, drop, bound, n, method, exact=True, measures=measures, **counts)


def _certificate(
    max_drop: float, confidence: float, drop: float, bound: float, n: int, method: Method, **more: Any
) -> Certificate:
    return Certificate(
        max_drop=float(max_drop),
        confidence=float(confidence),
        drop=float(drop),
        upper_bound=float(bound),
        n=n,
        method=method,
        certified=bool(bound <= max_drop),
        **more,
    )


def _bootstrap_bound(differences: Array, confidence: float, seed: int) -> float:
    n = differences.size
    if n < 2:
        raise DataError(f"scores: expected at least 2 examples to resample, got {n}; or declare `bounds`")
    if np.ptp(differences) == 0:
        return float(differences[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # almost equal differences; the result is checked below
        result = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=_MEAN_RESAMPLES,
            batch=max(1, _BATCH_VALUES // n),
            confidence_level=confidence,
            alternative="less",
            method="BCa" if n <= _BCA_UP_TO else "percentile",
            random_state=np.random.default_rng(seed),
        )
    bound = float(result.confidence_interval.high)
    return bound if isfinite(bound) else float(np.quantile(result.bootstrap_distribution, confidence))


def _scores(values: Any, name: str) -> Array:
    try:
        numbers = values.detach().cpu().double() if hasattr(values, "detach") else values
        scores: Array = np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected one number per example, got {type(values).__name__}: {error}") from None
    if scores.ndim != 1:
        raise DataError(
            f"{name}: expected one dimension, one score per example, got shape {scores.shape}; "
            "reduce each example to one score"
        )
    if scores.size == 0:
        raise DataError(f"{name}: expected at least one score, got none")
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise NonFiniteError(
            f"{name}: expected finite scores, got {wrong.size} NaN or Inf of {scores.size}, "
            f"the first at index {wrong[0]} ({scores[wrong[0]]}); look at the model's output for that example"
        )
    return scores


def _check_lengths(**lengths: int) -> None:
    if len(set(lengths.values())) > 1:
        arrived = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"expected the same examples in the same order, but {arrived}")


def _check_bounds(scores: Array, name: str, bounds: tuple[float, float]) -> None:
    if not (len(bounds) == 2 and isfinite(bounds[0]) and isfinite(bounds[1]) and bounds[0] < bounds[1]):
        raise ConfigError(f"bounds: expected (lowest, highest) with lowest < highest, got {bounds!r}")
    wrong = np.flatnonzero((scores < bounds[0]) | (scores > bounds[1]))
    if wrong.size:
        raise DataError(
            f"{name}: expected scores in [{bounds[0]}, {bounds[1]}], got {wrong.size} of "
            f"{scores.size} outside, the first at index {wrong[0]} ({scores[wrong[0]]}); "
            "declare the full range of the score"
        )


def _check_agreement(reference: Array, binary: bool) -> None:
    wrong = np.flatnonzero(reference != 1)
    if wrong.size:
        raise DataError(
            "reference_scores: with agreement=True every score is 1 by construction, got "
            f"{wrong.size} others, the first at index {wrong[0]} ({reference[wrong[0]]}); "
            "leave agreement=False"
        )
    if not binary:
        raise DataError("candidate_scores: with agreement=True expected only 0 and 1 (same answer or not)")


def _check_budget(max_drop: float, confidence: float, largest: float = inf) -> None:
    if not (isinstance(max_drop, Real) and 0 <= max_drop <= largest and isfinite(max_drop)):
        limit = "a finite number, 0 or more" if largest == inf else f"a fraction in [0, {largest}]"
        raise ConfigError(f"max_drop: expected {limit} (0.01 = one point of accuracy), got {max_drop!r}")
    if not (isinstance(confidence, Real) and 0 < confidence < 1):
        raise ConfigError(f"confidence: expected a number between 0 and 1, such as 0.95, got {confidence!r}")
