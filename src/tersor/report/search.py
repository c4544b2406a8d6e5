"""What the page, the card and the terminal say about the search that chose the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import NamedTuple

from tersor.core.report import Report
from tersor.core.search import Choice, CostRecord, LadderStep, SearchRecord, TrialRecord
from tersor.report import units, wording

NAMES_SHOWN = 3
NAMES_IN_TABLES = 12
FAILURES_SHOWN = 20
FROZEN_SHOWN = 40
NAME_LENGTH = 60
REASON_LENGTH = 160


class Gap(NamedTuple):
    """How far predictions lay from measurements: the median, over so many."""

    median: float
    n: int


class FormatGaps(NamedTuple):
    """Relative errors of predicted latencies in one number format; None where nothing was predicted."""

    format: str
    fitted: Gap | None
    unfitted: Gap | None
    trials: Gap | None


@dataclass(frozen=True)
class Found:
    """The record of a search beside what of the report it is read against.

    Attributes:
        record: Of the search.
        metric: What drops are counted in.
        max_drop: The budget; None without one.
        eager_ms: Of the uncompressed model in PyTorch eager, measured for the report.
    """

    record: SearchRecord
    metric: str
    max_drop: float | None
    eager_ms: float | None

    @cached_property
    def measured(self) -> list[TrialRecord]:
        """Trials with a drop and a latency, in the order in which they were asked for."""
        return [
            trial
            for trial in self.record.trials
            if units.known(trial.drop) and trial.latency_ms is not None and _positive(trial.latency_ms)
        ]

    @cached_property
    def failed(self) -> list[TrialRecord]:
        """Trials that did not finish."""
        return [trial for trial in self.record.trials if trial.status != "finished"]

    @cached_property
    def front(self) -> list[TrialRecord]:
        """Measured trials that no other beats, the fastest first."""
        numbers = set(self.record.front)
        return sorted((trial for trial in self.measured if trial.number in numbers), key=latency)

    @cached_property
    def chosen(self) -> TrialRecord | None:
        """The trial whose recipe was taken."""
        return next((trial for trial in self.record.trials if trial.number == self.record.chosen), None)

    @cached_property
    def ladder(self) -> dict[int, LadderStep]:
        """What the certify split said, by trial."""
        return {step.trial: step for step in self.record.ladder.steps} if self.record.ladder else {}

    @cached_property
    def _wholes(self) -> dict[str, int]:
        rows = self.record.damages.rows if self.record.damages else []
        return {row.name: row.options[0] for row in rows if row.options}

    @cached_property
    def baseline_ms(self) -> float | None:
        """Of the uncompressed model on the target, as the search measured it."""
        known = self.record.baseline_ms
        return known if known is not None and _positive(known) else None

    def feasible(self, trial: TrialRecord) -> bool:
        """Whether the drop on the search split is within the budget."""
        return self.max_drop is not None and trial.drop is not None and trial.drop <= self.max_drop

    def summary(self, choice: Choice, limit: int = NAMES_SHOWN) -> str:
        """A choice in a few words: number format, blocks that go, families that shrink."""
        parts = []
        if choice.skipped:
            parts.append(f"without {_listed(choice.skipped, limit)}")
        if choice.widths:
            parts.append(_listed([self._width(name, kept) for name, kept in sorted(choice.widths.items())], limit))
        return f"{units.one_line(choice.format, 20)}: {'; '.join(parts) or 'nothing cut'}"

    def _width(self, name: str, kept: int) -> str:
        whole = self._wholes.get(name)
        return f"{name} {units.integer(kept)}" + (f" of {units.integer(whole)}" if whole else " units")

    def drop(self, value: float | None) -> str:
        """A drop with its unit."""
        return f"{units.difference(value, self.metric)} {units.metric_unit(self.metric)}"

    def gain(self, whole: float | None, trial: TrialRecord) -> float | None:
        """How many times as fast as a baseline."""
        return whole / trial.latency_ms if whole and trial.latency_ms and _positive(trial.latency_ms) else None

    def gains(self, ms: float | None) -> str:
        """A latency against both baselines, as a clause."""
        if ms is None or not _positive(ms):
            return ""
        same, eager = "uncompressed in the same runtime", "PyTorch eager"
        parts = [
            wording.compared(whole / ms, f"faster than {name}", f"slower than {name}", f"as fast as {name}")
            for name, whole in ((same, self.baseline_ms), (eager, self.eager_ms))
            if whole
        ]
        return ", ".join(part for part in parts if part)

    def told(self, trial: TrialRecord) -> str:
        """All about one trial, for whoever points at it."""
        names = [f"Trial {trial.number}, rung {trial.rung}, {trial.source}"]
        names += ["on the front"] if trial.number in self.record.front else []
        names += ["chosen"] if trial is self.chosen else []
        lines = [", ".join(names), self.summary(trial.choice)]
        if trial.status != "finished":
            return "\n".join([*lines, f"{trial.status}: {units.one_line(trial.reason, REASON_LENGTH)}"])
        lines.append(f"drop {self.drop(trial.drop)} on the search split")
        step = self.ladder.get(trial.number)
        if step is not None:
            verdict = "certified" if step.certified else "not certified"
            bound = units.difference(step.upper_bound, self.metric, upwards=True)
            seen = units.difference(step.certify_drop, self.metric)
            lines.append(f"on the certify split {seen}, at most {bound}: {verdict}")
        gains = self.gains(trial.latency_ms)
        return "\n".join([*lines, units.milliseconds(trial.latency_ms) + (f": {gains}" if gains else "")])

    @cached_property
    def trials_apart(self) -> list[TrialRecord]:
        """Measured trials with a predicted latency that are no points of a cost table."""
        points = {point.choice.key for cost in self.record.costs for point in cost.points}
        return [trial for trial in self.measured if units.known(trial.predicted_ms) and trial.choice.key not in points]

    def gaps(self) -> list[FormatGaps]:
        """Relative errors of predicted latencies, by number format."""
        costs = {cost.format: cost for cost in self.record.costs}
        formats = dict.fromkeys([*costs, *(trial.choice.format for trial in self.trials_apart)])
        return [
            FormatGaps(
                name,
                _table_gap(costs.get(name), fitted=True),
                _table_gap(costs.get(name), fitted=False),
                _gap(_pair(trial) for trial in self.trials_apart if trial.choice.format == name),
            )
            for name in formats
        ]

    def latency_gap(self) -> Gap | None:
        """Median relative error of latencies that were predicted before they were measured."""
        points = [(p.predicted_ms, p.measured_ms) for c in self.record.costs for p in c.points if not p.fitted]
        return _gap([*points, *(_pair(trial) for trial in self.trials_apart)])

    def drop_gap(self) -> Gap | None:
        """Median absolute error of predicted drops, in units of the metric."""
        errors = [
            abs(trial.predicted_drop - trial.drop)
            for trial in self.measured
            if trial.drop is not None and trial.predicted_drop is not None and units.known(trial.predicted_drop)
        ]
        return Gap(median(errors), len(errors)) if errors else None


def found(report: Report) -> Found | None:
    """The search of a run; None if the recipe was given."""
    if report.search is None:
        return None
    limit = report.certificate.max_drop if report.certificate else report.budget.get("max_drop")
    eager = report.baseline.latency_ms
    return Found(
        record=report.search,
        metric=wording.certified_metric(report),
        max_drop=float(limit) if isinstance(limit, int | float) and units.known(limit) else None,
        eager_ms=eager.median if eager and _positive(eager.median) else None,
    )


def latency(trial: TrialRecord) -> tuple[float, int]:
    """What trials are ordered by: the fastest first, of equally fast ones the earlier."""
    return trial.latency_ms or 0.0, trial.number


def counted(seen: Found) -> str:
    """How much was tried in how much time, as a clause."""
    record = seen.record
    trials = len(record.trials)
    text = f"{units.integer(trials)} trial{'s' if trials != 1 else ''}"
    if seen.failed:
        text += f", {units.integer(len(seen.failed))} of them failed,"
    return f"{text} in {units.seconds(record.seconds)} of {units.seconds(60 * record.minutes)} allowed"


def accuracy(seen: Found) -> str:
    """How well latencies were predicted, as a clause; empty if nothing was predicted."""
    gap = seen.latency_gap()
    return f"latency predicted within {units.small_percent(gap.median)} (median of {gap.n})" if gap else ""


def line(report: Report) -> str:
    """One line for the terminal; empty without a search."""
    seen = found(report)
    if seen is None:
        return ""
    chosen = f"trial {seen.chosen.number} chosen" if seen.chosen else "none chosen"
    parts = [f"{counted(seen)}; {units.integer(len(seen.record.front))} on the front", chosen, accuracy(seen)]
    return f"search: {', '.join(part for part in parts if part)}"


def paragraph(report: Report) -> str:
    """How the recipe was found, for the card; empty if no search chose it."""
    seen = found(report)
    if seen is None or seen.chosen is None:
        return ""
    trial, front = seen.chosen, len(seen.record.front)
    parts = [
        f"The recipe was chosen by a search ({units.one_line(seen.record.method, NAME_LENGTH)}, seed "
        f"{seen.record.seed}): {counted(seen)}.",
        f"{units.integer(front)} of them {'is' if front == 1 else 'are'} not beaten in both drop and latency.",
        f"Chosen was trial {trial.number} ({seen.summary(trial.choice)}): {units.milliseconds(trial.latency_ms)} and a "
        f"drop of {seen.drop(trial.drop)} on the search split.",
        f"{wording.capital(accuracy(seen))}." if accuracy(seen) else "",
        tested(seen),
    ]
    return " ".join(part for part in parts if part)


def tested(seen: Found) -> str:
    """What the certify split was asked, as a sentence; empty if it was not asked."""
    ladder = seen.record.ladder
    if ladder is None or not ladder.steps:
        return ""
    passed, asked = sum(step.certified for step in ladder.steps), len(ladder.steps)
    order = f"{units.integer(asked)} candidate{'s were' if asked != 1 else ' was'} tested on the certify split"
    if not passed:
        return f"{order}; none passed."
    sure = f"{confidence(ladder.confidence)} confidence"
    return f"{order}, in an order fixed before; {units.integer(passed)} passed, with {sure} for all of them together."


def confidence(share: float) -> str:
    """A confidence as a percentage, never rounded up to certainty."""
    return f"{min(round(100 * share, 10), 99.9999999999):.12g} %" if units.known(share) else units.MISSING


def _listed(names: Sequence[str], limit: int) -> str:
    shown = [units.one_line(name, NAME_LENGTH) for name in names[:limit]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _table_gap(cost: CostRecord | None, *, fitted: bool) -> Gap | None:
    error = cost.error(fitted=fitted) if cost else None
    return Gap(error, sum(p.fitted is fitted for p in cost.points)) if cost and error is not None else None


def _gap(pairs: Iterable[tuple[float, float]]) -> Gap | None:
    errors = [abs(said / seen - 1) for said, seen in pairs if units.known(said) and _positive(seen)]
    return Gap(median(errors), len(errors)) if errors else None


def _pair(trial: TrialRecord) -> tuple[float, float]:
    return trial.predicted_ms or 0.0, trial.latency_ms or 0.0


def _positive(value: float) -> bool:
    return units.known(value) and value > 0
