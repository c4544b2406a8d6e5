"""The search itself: which trials are run, in which order, until the time is over.

It knows nothing of models and machines: a `Laboratory` runs trials and measures tables, a `Book` remembers. All
decisions follow from what the book holds, so a search that is killed goes on where it was, and one that is replayed
ends the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tersor.core.search import Choice, Source, TrialRecord
from tersor.search.correction import DropModel, adjust
from tersor.search.costs import CostTable, Point
from tersor.search.damage import DamageTable
from tersor.search.front import front
from tersor.search.halving import RUNGS, fall, final_drop, promoted, trials_on
from tersor.search.program import CostLimits, fastest, solve, sweep
from tersor.search.sampler import Sampler
from tersor.search.settings import Search
from tersor.search.space import Space
from tersor.search.store import Job

logger = logging.getLogger("tersor")

SLOWEST = 0.9  # of the whole model's time: what saves less is not worth a trial
AROUND = (1.0, 0.85, 1.2, 0.7)  # of the time at which the aim is expected to be met
HALVINGS = 12


class Laboratory(Protocol):
    """What the search is given: everything that touches a model."""

    def run(self, jobs: Sequence[Job]) -> list[TrialRecord]:
        """Runs trials, or takes them from the book; those for which there is no time are left out."""

    def costs(self, format: str) -> CostTable:
        """The cost table of a number format."""

    def damages(self) -> DamageTable:
        """The damage table."""


@dataclass
class Driver:
    """One search.

    Attributes:
        space: What can be decided.
        settings: What the search may do.
        aim: Largest drop on the search split that is worth a finalist: what the certify split can prove.
        lab: Runs trials.
        seed: Of all draws.
        tables: Cost tables by format, corrected by what was measured.
        damage: The damage table, corrected likewise; None until something is cut.
        records: Trials in the order in which they were asked for.
    """

    space: Space
    settings: Search
    aim: float
    lab: Laboratory
    seed: int
    tables: dict[str, CostTable] = field(default_factory=dict)
    damage: DamageTable | None = None
    records: list[TrialRecord] = field(default_factory=list)

    def run(self) -> list[TrialRecord]:
        """All trials of the search; the finished ones of the last rung are its finalists."""
        format = self._formats()
        if not self.space.groups:
            logger.info("search: nothing of this model can be cut; only number formats were compared")
            return self.records
        self.damage = self.lab.damages()
        self.tables[format] = self.lab.costs(format)
        self._lowest_rung(format)
        for rung in range(1, RUNGS):
            count = trials_on(
                rung, trials=self.settings.trials, eta=self.settings.eta, finalists=self.settings.finalists
            )
            self._promote(rung, count, format)
        return self.records

    def contenders(self) -> list[TrialRecord]:
        """Finished trials that no other beats in both drop and latency, the fastest first."""
        done = self._finished()
        best = front([(record.latency_ms or 0.0, record.drop or 0.0) for record in done])
        return sorted((done[index] for index in best), key=lambda record: (record.latency_ms, record.number))

    def _formats(self) -> str:
        """Tries the whole model in every format; the fastest that leaves half of the aim is worked with."""
        jobs = [self._job(Choice(format=format), 0, "preset") for format in self.space.formats]
        whole = self._run(jobs)
        if not whole:
            return self.space.formats[0]
        inside = [record for record in whole if (record.drop or 0.0) <= self.aim / 2]
        if inside:
            return min(inside, key=lambda record: record.latency_ms or 0.0).choice.format
        return min(whole, key=lambda record: record.drop or 0.0).choice.format

    def _lowest_rung(self, format: str) -> None:
        """Half of the trials over all latencies, half where the corrected tables expect the aim, some by a sampler."""
        trials, drawn = self.settings.trials, min(self.settings.refine, self.settings.trials - 1)
        if self.settings.strategy == "sampler":
            for _ in range(trials):
                self._sampled(format, around=False)
            return
        source: Source = "once-for-all" if self.settings.strategy == "once-for-all" else "program"
        spread = max(1, (trials - drawn + 1) // 2)
        self._run([self._job(choice, 0, source) for choice in self._spread(format, spread)])
        self._correct(format)
        for factor in self._around(trials - drawn - spread):
            choice = self._aimed(format, factor)
            if choice is not None:
                self._run([self._job(choice, 0, source)])
                self._correct(format)
        for _ in range(drawn):
            self._sampled(format, around=True)
        self._correct(format)

    def _spread(self, format: str, count: int) -> list[Choice]:
        table, damage = self.tables[format], self._damage()
        whole = table.predict_ms(Choice(format=format))
        low = table.predict_ms(fastest(self.space, table, format))
        # The very fastest is left out: it is what nobody's budget allows, and a trial is dear.
        low += (whole * SLOWEST - low) / (count + 1)
        return sweep(
            self.space,
            table,
            damage,
            format=format,
            points=count,
            between=(low, whole * SLOWEST),
            without=self._tried(),
        )

    def _around(self, count: int) -> list[float]:
        return [AROUND[index % len(AROUND)] for index in range(count)]

    def _aimed(self, format: str, factor: float) -> Choice | None:
        """The best choice at `factor` times the smallest latency at which the aim is expected to be met."""
        table, damage = self.tables[format], self._damage()
        model = DropModel()
        trained = [record for record in self._finished() if self._cut(record)]
        factor_of_rungs = fall(self.records)
        model.fit(
            [damage.predict(self.space, record.choice) for record in trained],
            [final_drop(record, factor_of_rungs) for record in trained],
        )
        low = table.predict_ms(fastest(self.space, table, format))
        high = whole = table.predict_ms(Choice(format=format))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            choice = solve(self.space, table, damage, CostLimits(max_ms=middle), format=format)
            met = choice is not None and model.predict(damage.predict(self.space, choice)) <= self.aim
            low, high = (low, middle) if met else (middle, high)
        limit = min(high * factor, whole * SLOWEST)
        return solve(self.space, table, damage, CostLimits(max_ms=limit), format=format, without=self._tried())

    def _sampled(self, format: str, *, around: bool) -> None:
        sampler = Sampler(self.space, format, seed=self.seed + len(self.records))
        choice = sampler.ask(self._finished(), near=self.contenders() if around else (), without=self._tried())
        if choice is not None:
            self._run([self._job(choice, 0, "sampler")])

    def _promote(self, rung: int, count: int, format: str) -> None:
        factor = fall(self.records)
        latest: dict[str, TrialRecord] = {}
        for record in self._finished():
            if self._cut(record) and record.rung == rung - 1:
                latest[record.choice.key] = record
        predicted = {record.number: final_drop(record, factor) for record in latest.values()}
        chosen = promoted(list(latest.values()), predicted, aim=self.aim, count=count)
        self._run([self._job(record.choice, rung, record.source) for record in chosen])
        self._correct(format)

    def _job(self, choice: Choice, rung: int, source: Source) -> Job:
        table, expected = self.tables.get(choice.format), None
        if self.damage is not None:
            trained = [record for record in self._finished() if self._cut(record)]
            if trained:
                model, factor = DropModel(), fall(self.records)
                model.fit(
                    [self.damage.predict(self.space, record.choice) for record in trained],
                    [final_drop(record, factor) for record in trained],
                )
                expected = model.predict(self.damage.predict(self.space, choice)) / factor ** (RUNGS - 1 - rung)
        predicted_ms = None if table is None else table.predict_ms(choice)
        return Job(choice=choice, rung=rung, source=source, predicted_drop=expected, predicted_ms=predicted_ms)

    def _run(self, jobs: Sequence[Job]) -> list[TrialRecord]:
        """Runs what is left of the jobs and returns those that finished."""
        records = self.lab.run(jobs)
        self.records.extend(records)
        return [record for record in records if record.status == "finished"]

    def _correct(self, format: str) -> None:
        """Fits the tables anew on what trials measured."""
        done = [record for record in self._finished() if record.choice.format == format]
        self.tables[format] = self.tables[format].with_points(points_of(done))
        factor = fall(self.records)
        trained = [(record.choice, final_drop(record, factor)) for record in done if self._cut(record)]
        if len(trained) >= 3 and self.damage is not None:
            self.damage = adjust(self.lab.damages(), trained, self.space)

    def _finished(self) -> list[TrialRecord]:
        return [record for record in self.records if record.status == "finished"]

    def _tried(self) -> list[Choice]:
        return [record.choice for record in self.records]

    def _damage(self) -> DamageTable:
        assert self.damage is not None  # noqa: S101 - measured before the first choice is made
        return self.damage

    @staticmethod
    def _cut(record: TrialRecord) -> bool:
        return bool(record.choice.skipped or record.choice.widths)


def points_of(records: Sequence[TrialRecord]) -> list[Point]:
    """What finished trials measured, for a cost table; of a choice that was on several rungs once."""
    points = {
        record.choice.key: Point(
            choice=record.choice,
            latency_ms=record.latency_ms,
            size_bytes=record.size_bytes,
            macs=record.macs,
            peak_memory_bytes=record.peak_memory_bytes,
        )
        for record in records
        if record.latency_ms is not None and record.size_bytes is not None and record.macs is not None
    }
    return list(points.values())
