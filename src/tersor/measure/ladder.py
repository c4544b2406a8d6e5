"""Fixed-sequence testing: which of many candidates may be certified on one split, without paying for each.

Whoever tests m candidates and keeps the fastest that passes errs up to m times as often as a single test. But if
their order is fixed before the certify split is seen, and testing ends at the first failure, all of them can be
tested at the full level α: a wrong certificate needs the first candidate over the budget *in that order* to pass,
and that is one test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052). The order comes from the front of
latency and risk on the search split, the safest first (Laufer-Goldshtein et al. 2023,
https://arxiv.org/abs/2210.07913).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, sqrt

from tersor.core.certificate import Certificate
from tersor.core.search import Ladder, LadderStep
from tersor.errors import ConfigError, DataError, NonFiniteError, SplitTooSmallError
from tersor.measure import exact_paired
from tersor.measure.certificate import EXACT_POWER_UP_TO, normal_margin


@dataclass(frozen=True)
class Contender:
    """A trial that may be certified, and what the search split told of it.

    Attributes:
        trial: Its number.
        latency_ms: On the target.
        search_drop: Observed drop of the metric, original - deployed.
        search_bound: Upper bound on the drop, or anything else that is the smaller the safer it is, such as the p-value
            of "the drop is over the budget".
    """

    trial: int
    latency_ms: float
    search_drop: float
    search_bound: float

    def __post_init__(self) -> None:
        """Refuses what cannot be ordered."""
        if not (isfinite(self.latency_ms) and isfinite(self.search_drop)) or isnan(self.search_bound):
            raise NonFiniteError(
                f"trial {self.trial}: expected numbers, got latency_ms={self.latency_ms}, "
                f"search_drop={self.search_drop}, search_bound={self.search_bound}; leave failed trials out"
            )


def order(contenders: Iterable[Contender]) -> list[Contender]:
    """The order of the tests, from the search split alone: from slow and safe to fast and risky.

    Only the front of (latency, `search_bound`) is tested: every step gains speed and takes risk, and what a safer and
    faster one dominates could end the ladder but never be chosen. Risk is the bound and not the observed drop, because
    of two equal drops the one with fewer flips is certified more easily. The ladder begins at the safest contender,
    however slow, and not where the first failure is expected: a test that passes costs no confidence, and the safest
    one is the least likely to end everything at once.

    Args:
        contenders: trials of the search, in any order.

    Returns:
        Contenders with falling latency and rising `search_bound`; of equal ones, that with the smaller drop or number.

    Raises:
        DataError: two contenders have one number.

    Paper: https://arxiv.org/abs/2210.07913
    """
    everyone = list(contenders)
    twice = sorted(trial for trial, count in Counter(c.trial for c in everyone).items() if count > 1)
    if twice:
        raise DataError(f"contenders: expected every trial once, got {twice} more often")
    front: list[Contender] = []
    for contender in sorted(everyone, key=lambda c: (c.latency_ms, c.search_bound, c.search_drop, c.trial)):
        if not front or contender.search_bound < front[-1].search_bound:
            front.append(contender)
    return front[::-1]


def climb(
    contenders: Sequence[Contender],
    test: Callable[[Contender], Certificate],
    *,
    confidence: float,
    level: float,
    times_asked: int,
) -> Ladder:
    """Tests the contenders in their order at `level`, until the first that fails.

    P(any that passes is over its budget) <= 1 - level for all of them together, whatever their number and however
    they depend on each other. If the first one fails, nothing is certified, and its certificate's `examples_needed`
    tells how much data would do.

    Args:
        contenders: from `order`, fixed before the certify split was seen.
        test: asks the certify split about one contender, at `level`.
        confidence: that is promised over all runs that ever ask this split.
        level: of this run, from `ledger.level_of`; the whole ladder is one question.
        times_asked: runs that have asked this split, this one included.

    Returns:
        What was tested, and what was not.

    Raises:
        ConfigError: `level` is below `confidence`, or a certificate was computed at less than `level`.

    Paper: https://arxiv.org/abs/2110.01052
    """
    if not 0 < confidence <= level < 1:
        raise ConfigError(f"expected 0 < confidence <= level < 1, got confidence={confidence!r} and level={level!r}")
    steps: list[LadderStep] = []
    for contender in contenders:
        certificate = test(contender)
        tested_at = certificate.confidence if certificate.level is None else certificate.level
        if tested_at < level:
            raise ConfigError(
                f"trial {contender.trial}: expected a certificate at confidence {level!r}, got one at {tested_at!r}; "
                "the promise would not hold"
            )
        steps.append(
            LadderStep(
                trial=contender.trial,
                latency_ms=contender.latency_ms,
                search_drop=contender.search_drop,
                certify_drop=certificate.drop,
                upper_bound=certificate.upper_bound,
                certified=certificate.certified,
            )
        )
        if not certificate.certified:
            break
    untested = [contender.trial for contender in contenders[len(steps) :]]
    return Ladder(confidence=confidence, spent=level, times_asked=times_asked, steps=steps, untested=untested)


def chosen(ladder: Ladder) -> int | None:
    """The trial that is the fastest of those that passed; None if nothing did."""
    passed = [step for step in ladder.steps if step.certified]
    return min(passed, key=lambda step: step.latency_ms).trial if passed else None


def reachable(
    n: int, max_drop: float, *, confidence: float = 0.95, flip_rate: float = 0.05, power: float = 0.8
) -> float:
    """The largest true drop that n examples of 0/1 scores certify with probability `power`.

    A search that aims at it, and not at the budget, finds what can be certified: budget - reachable is the margin.
    p10 + p01 = max(flip_rate, |drop|), p10 - p01 = drop; by bisection over the exact power, and by the normal
    formula of `examples_needed` above 10,000 examples.

    Args:
        n: number of certify examples.
        max_drop: the budget, a fraction in [0, 1].
        confidence: of the test, in (0, 1); `ledger.level_of` where a ledger is kept.
        flip_rate: share of examples whose answer flips, either way, in (0, 1].
        power: wanted probability of a certificate, in (0, 1).

    Returns:
        A drop, rounded down by at most 1 % of the budget or of 1 / n; below 0: even an equally good candidate would
        fail more often.

    Raises:
        ConfigError: an argument is out of range.
        SplitTooSmallError: not even flips that are all gains would do.

    Paper: https://doi.org/10.1002/sim.3229
    """
    if not (n >= 1 and 0 <= max_drop <= 1 and 0 < confidence < 1 and 0 < flip_rate <= 1 and 0 < power < 1):
        raise ConfigError(
            "expected n >= 1, max_drop in [0, 1], confidence, flip_rate and power between 0 and 1, got "
            f"n={n!r}, max_drop={max_drop!r}, confidence={confidence!r}, flip_rate={flip_rate!r}, power={power!r}"
        )

    def enough(drop: float) -> bool:
        flips = max(flip_rate, abs(drop))
        losses, gains = (flips + drop) / 2, (flips - drop) / 2
        if n <= EXACT_POWER_UP_TO:
            return exact_paired.power(losses, gains, n, max_drop, confidence) >= power
        margin = normal_margin(losses, gains, max_drop=max_drop, confidence=confidence, power=power)
        return margin <= sqrt(n) * (max_drop - drop)

    low, high = -flip_rate, max_drop
    if not enough(low):
        raise SplitTooSmallError(
            f"{n} examples cannot certify a drop of at most {max_drop:g} at confidence {confidence:g}, even if all of "
            f"{flip_rate:.0%} flips were gains; give more examples or allow a larger max_drop"
        )
    while high - low > 0.01 * max(max_drop, 1 / n):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low
