"""Successive halving: how long each rung trains, and who goes on.

Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943; Li et al. 2018 (Hyperband), https://arxiv.org/abs/1603.06560.
A drop shrinks with further training; by how much is learned from the trials that have been on two rungs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from tersor.core.search import TrialRecord

RUNGS = 3
FALL = 0.6  # of a drop from one rung to the next, while nothing is known
SHARPEST, FLATTEST = 0.2, 1.0


def trials_on(rung: int, *, trials: int, eta: int, finalists: int) -> int:
    """How many trials reach a rung, 0 being the lowest."""
    if rung == 0:
        return trials
    return max(finalists, math.ceil(trials / eta)) if rung < RUNGS - 1 else min(finalists, trials)


def steps_on(
    rung: int, *, seconds: float, seconds_per_step: float, trials: int, eta: int, finalists: int, first: int = 0
) -> int:
    """Optimizer steps of one trial on a rung, so that all trainings from the rung `first` on take `seconds`."""
    shares = [
        trials_on(level, trials=trials, eta=eta, finalists=finalists) * eta**level for level in range(first, RUNGS)
    ]
    return max(1, int(eta**rung * seconds / (seconds_per_step * sum(shares))))


def fall(records: Sequence[TrialRecord]) -> float:
    """By which factor a drop shrinks from one rung to the next: the median over trials that were on both."""
    drops = {(record.choice.key, record.rung): record.drop for record in records if record.drop is not None}
    ratios = [
        max(drops[key, rung + 1], 0.0) / drop
        for (key, rung), drop in drops.items()
        if (key, rung + 1) in drops and drop > 0
    ]
    return min(FLATTEST, max(SHARPEST, median(ratios))) if ratios else FALL


def final_drop(record: TrialRecord, factor: float) -> float:
    """The drop that is expected after the last rung; nothing is expected of a model that needs no training."""
    assert record.drop is not None  # noqa: S101 - callers pass finished trials
    trained = bool(record.choice.skipped or record.choice.widths)
    return record.drop * factor ** (RUNGS - 1 - record.rung) if trained and record.drop > 0 else record.drop


def promoted(
    records: Sequence[TrialRecord], predicted: Mapping[int, float], *, aim: float, count: int
) -> list[TrialRecord]:
    """Who goes on: the fastest whose predicted drop is inside the aim, those that miss it by least, then the rest.

    One that is slower than another inside the aim can only lose to it, while one outside may come in: predictions are
    rough, and what certifies nothing costs nothing but its training.

    Args:
        records: Finished trials of one rung, with latencies.
        predicted: Number of the trial -> drop after the last rung.
        aim: Largest drop that may be certified.
        count: How many go on.
    """
    inside = sorted((r for r in records if predicted[r.number] <= aim), key=lambda r: (r.latency_ms or 0.0, r.number))
    outside = sorted((r for r in records if predicted[r.number] > aim), key=lambda r: (predicted[r.number], r.number))
    return [*inside[:1], *outside, *inside[1:]][:count]
