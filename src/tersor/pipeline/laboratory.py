"""What a search is given: trials in processes of their own, latencies when nothing else runs, tables, and the clock."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from tersor.core.context import Progress
from tersor.core.files import write_whole
from tersor.core.machine import versions
from tersor.core.report import Latency
from tersor.core.search import Choice, TrialRecord
from tersor.core.step import Step
from tersor.distill import OnceForAll, Recover
from tersor.errors import ConfigError, MeasurementError
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.measure.latency import Measured
from tersor.measure.lease import Lease
from tersor.pipeline.points import Builder
from tersor.pipeline.trial import Foundation, Material, Outcome, Trial
from tersor.runtimes import Loaded
from tersor.search.cost_store import fingerprint, measure_table
from tersor.search.costs import CostTable, Point
from tersor.search.damage import DamageTable, measure_damage
from tersor.search.defaults import training
from tersor.search.discover import SHARES
from tersor.search.family import FamilyName
from tersor.search.halving import RUNGS, steps_on, trials_on
from tersor.search.moves import steps_of
from tersor.search.settings import Search
from tersor.search.store import Job, TrialStore
from tersor.search.supervise import Ended, Limits, Pool

logger = logging.getLogger("tersor")

DAMAGE_EXAMPLES, DAMAGE_BATCH = 256, 64
QUICK = Protocol(rounds=6, round_seconds=0.15)
PATIENCE, GRACE = 3.0, 120.0  # a trial may take so many times what was expected, and so many seconds more
EXPORT_SECONDS = 30.0  # of a trial without its training, while none has been run
NETWORKS = 3.5  # trainings of the whole model that one step of the super-network is worth
FASTEST = 0.2  # of the whole model's time that a step is believed to take at least
FINISH = 0.1  # share of the time that is kept for the certificate and the last measurements


@dataclass
class Laboratory:
    """The models and the machine of one search; see `tersor.search.driver.Laboratory`.

    Attributes:
        material: What all trials share.
        saved: Where it was saved for them.
        uncompressed: The caller's model in the target's runtime.
        settings: What the search may do.
        family: What kind of network it is.
        store: Of the trials.
        seconds_per_step: Of training the whole model with the original beside it.
        progress: Told which trial runs.
    """

    material: Material
    saved: Path
    uncompressed: Loaded
    settings: Search
    family: FamilyName
    store: TrialStore
    seconds_per_step: float
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    earlier: float = 0.0
    lease: Lease = field(default_factory=Lease)
    _damages: DamageTable | None = None

    def __post_init__(self) -> None:
        self.store.abandon_stale()
        self.earlier = sum(record.seconds for record in self.store.finished())

    @property
    def seconds(self) -> float:
        """That the search has taken, with what it took before it was interrupted."""
        return self.earlier + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that trials may still take."""
        return 60 * self.settings.minutes * (1 - FINISH) - self.seconds

    # --- trials

    def run(self, jobs: Sequence[Job]) -> list[TrialRecord]:
        """Runs trials, or takes them from the store; those for which there is no time are left out."""
        ended = {(record.choice.key, record.rung): record for record in self.store.finished()}
        claimed: dict[str, tuple[int, Job]] = {}
        plan = self.material.plan
        with Pool(self.settings.workers, threads=plan.target.threads) as pool, ExitStack() as working:
            for job in jobs:
                if (job.choice.key, job.rung) in ended:
                    continue
                expected = self._expected(job)
                if self._is_over(expected):
                    logger.info("search: no time is left for %s on rung %d", job.choice.key, job.rung)
                    continue
                number = self.store.start(job)
                if number is None:
                    continue
                claimed[str(number)] = number, job
                trial = Trial(self.saved, job.choice, tuple(self.steps(job.choice, job.rung)), job.rung, self._super)
                limits = Limits(
                    log=self.material.directory / f"{number:04d}.log",
                    seconds=PATIENCE * expected + GRACE,
                    memory_bytes=self.settings.memory_bytes,
                    on_start=lambda group: working.enter_context(self.lease.working(group)),
                    poll=self._heal,
                )
                pool.submit(str(number), trial, limits)
            for name, result in pool.as_completed():
                number, job = claimed[name]
                record = self._record(number, job, result)
                self.store.finish(record)
                ended[job.choice.key, job.rung] = record
                self.progress("trials", len(self.store.finished()), self._most())
                _tell(record)
        return [ended[job.choice.key, job.rung] for job in jobs if (job.choice.key, job.rung) in ended]

    def _is_over(self, expected: float) -> bool:
        """Whether no trial is started any more: once one found no time, so that a replayed search ends the same."""
        marker = self.material.directory / "time-is-over"
        if not marker.exists() and expected > self.left:
            write_whole(marker, b"")
        return marker.exists()

    def steps(self, choice: Choice, rung: int) -> list[Step]:
        """The recipe of a choice on a rung: trainings of all rungs up to it, one after another."""
        trainings = [self.training(level) for level in range(rung + 1)] if choice.skipped or choice.widths else []
        criterion = "order" if self._sliced else self.settings.criterion
        steps = steps_of(choice, self.material.space, trainings, criterion=criterion)
        return [self.foundation, *steps] if self._sliced and trainings else steps

    @property
    def _sliced(self) -> bool:
        """Whether all choices are slices of one super-network."""
        return self.settings.strategy == "once-for-all"

    @cached_property
    def foundation(self) -> OnceForAll:
        """The training of the super-network, which takes half of the time that was left when this was first asked."""
        path = self.material.directory / "foundation.json"
        if path.exists():
            return OnceForAll(**json.loads(path.read_text()))
        seconds = self.seconds_per_step * NETWORKS
        steps = max(1, int(self.left / 2 / seconds))
        schedule = training(self.settings, self.family, self.material.plan.task, steps).schedule
        step = OnceForAll(widths=SHARES, schedule=schedule, temperature=self.settings.temperature)
        write_whole(path, json.dumps(step.model_dump(mode="json")).encode())
        return step

    @property
    def _super(self) -> Path | None:
        """What the super-network's training left, for trials to begin with."""
        return self.material.foundation_of([self.foundation]) if self._sliced else None

    def train_foundation(self) -> None:
        """Trains the super-network, or goes on with it.

        Raises:
            ConfigError: if it cannot be trained, with the reason.
        """
        if not self._sliced or not self.material.space.groups or (self._super and self._super.exists()):
            return
        plan = self.material.plan
        logger.info("search: training the super-network")
        limits = Limits(
            log=self.material.directory / "foundation.log", memory_bytes=self.settings.memory_bytes, poll=self._heal
        )
        with Pool(1, threads=plan.target.threads) as pool:
            pool.submit("foundation", Foundation(self.saved, (self.foundation,)), limits)
            for _, result in pool.as_completed():
                if result.status != "finished":
                    raise ConfigError(f"the super-network could not be trained: {result.status}, {result.reason}")

    def training(self, rung: int) -> Recover:
        """The training of a rung, as long as the time allows that is left when it is first asked for.

        The length is kept: otherwise a search that goes on later would train otherwise than it did before.
        """
        path = self.material.directory / f"steps-{rung}.json"
        if not path.exists():
            write_whole(path, json.dumps(self._steps(rung)).encode())
        return training(self.settings, self.family, self.material.plan.task, int(json.loads(path.read_text())))

    def _steps(self, rung: int) -> int:
        """Steps of a rung, if it and those above share what is left after exports and measurements."""
        shape = {"trials": self.settings.trials, "eta": self.settings.eta, "finalists": self.settings.finalists}
        ahead = sum(trials_on(level, **shape) for level in range(rung, RUNGS))
        seconds = max(1.0, self.left - ahead * self._overhead()) * self.settings.workers
        steps = steps_on(rung, seconds=seconds, seconds_per_step=self._seconds_per_step(), first=rung, **shape)
        logger.info("search: rung %d trains %d steps", rung, steps)
        return steps

    def _seconds_per_step(self) -> float:
        """As trials took it; before there are any, half of the whole model's: most choices are much smaller."""
        trained = [r for r in self.store.finished() if r.status == "finished" and (r.choice.skipped or r.choice.widths)]
        if not trained:
            return self.seconds_per_step / 2
        rung = max(record.rung for record in trained)  # on the lowest one, cutting takes as long as training
        steps = self.training(rung).schedule.max_steps or 1
        rates = [max(0.0, record.seconds - self._overhead()) / steps for record in trained if record.rung == rung]
        return max(statistics.median(rates), FASTEST * self.seconds_per_step)

    def _expected(self, job: Job) -> float:
        """Seconds that a trial is expected to take."""
        if not (job.choice.skipped or job.choice.widths):
            return 0.0  # what is tried first, and must be
        return self._overhead() + (self.training(job.rung).schedule.max_steps or 0) * self._seconds_per_step()

    def _overhead(self) -> float:
        seconds = [r.seconds for r in self.store.finished() if not (r.choice.skipped or r.choice.widths)]
        return max(seconds, default=EXPORT_SECONDS)

    def _most(self) -> int:
        trials, eta, finalists = self.settings.trials, self.settings.eta, self.settings.finalists
        trained = sum(trials_on(rung, trials=trials, eta=eta, finalists=finalists) for rung in range(RUNGS))
        return trained + len(self.material.space.formats)

    def _record(self, number: int, job: Job, result: Ended) -> TrialRecord:
        record = TrialRecord(
            number=number,
            choice=job.choice,
            rung=job.rung,
            source=job.source,
            status=result.status,
            reason=result.reason,
            predicted_drop=job.predicted_drop,
            predicted_ms=job.predicted_ms,
            seconds=result.seconds,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if result.status != "finished":
            return record
        outcome: Outcome = result.value
        try:
            latency_ms, peak_memory_bytes = self._timed(job)
        except MeasurementError as error:
            return record.model_copy(update={"status": "failed", "reason": f"its latency was not measured: {error}"})
        return record.model_copy(
            update={
                "drop": outcome.drop,
                "drop_bound": outcome.bound,
                "size_bytes": outcome.size_bytes,
                "macs": outcome.macs,
                "recipe": dict(outcome.recipe),
                "latency_ms": latency_ms,
                "peak_memory_bytes": peak_memory_bytes,
            }
        )

    # --- measurements

    def _timed(self, job: Job) -> tuple[float, int | None]:
        """Latency and peak memory of a trial. They do not depend on its training: a lower rung's are taken again."""
        for record in self.store.finished():
            if record.choice.key == job.choice.key and record.latency_ms is not None:
                return record.latency_ms, record.peak_memory_bytes
        loaded = self.material.loaded(self.steps(job.choice, job.rung), job.choice, job.rung)
        protocol = Protocol(rounds=self.material.plan.budget.rounds)
        found = self.latencies({"trial": loaded}, protocol)["trial"]
        return found.latency.median, found.peak_memory_bytes

    def latencies(self, models: Mapping[str, Loaded], protocol: Protocol) -> dict[str, Measured]:
        """Latencies in milliseconds as on the day of the first measurement: the uncompressed model is always beside."""
        plan = self.material.plan
        preload = (plan.runtime.package,)
        contestants = {name: Contestant(model, preload) for name, model in models.items()}
        with self.lease.measuring():
            found = latency(
                {"uncompressed": Contestant(self.uncompressed, preload), **contestants},
                plan.task.example(plan.target.batch),
                threads=plan.target.threads,
                protocol=protocol,
            )
        reference = found.pop("uncompressed").latency
        baseline = self.baseline_ms
        if baseline is None:
            baseline = reference.median
            write_whole(self._kept_baseline, json.dumps(baseline).encode())
        return {
            name: measured._replace(latency=_scaled(measured.latency, reference, baseline))
            for name, measured in found.items()
        }

    @property
    def baseline_ms(self) -> float | None:
        """Of the uncompressed model on the target, when it was first measured; kept for a search that goes on."""
        return float(json.loads(self._kept_baseline.read_text())) if self._kept_baseline.exists() else None

    @property
    def _kept_baseline(self) -> Path:
        return self.material.directory / "baseline.json"

    def costs(self, format: str) -> CostTable:
        """The cost table of a number format; what was measured before on this machine is taken again."""
        plan, space = self.material.plan, self.material.space
        version = versions().get(plan.runtime.package, "")
        key = fingerprint(
            space,
            format,
            runtime=plan.runtime.name,
            version=version,
            threads=plan.target.threads,
            batch=plan.target.batch,
        )
        builder = Builder(plan, space, format)

        def measure(choices: Sequence[Choice]) -> list[Point]:
            with builder.built(choices) as models:
                found = self.latencies({key: model.loaded for key, model in models.items()}, QUICK)
                return [builder.point(choice, models[choice.key], found[choice.key]) for choice in choices]

        return measure_table(space, format, measure, fingerprint=key, points=self.settings.points, seed=plan.seed)

    def damages(self) -> DamageTable:
        """What each decision does alone, on calibration examples."""
        if self._damages is None:
            plan = self.material.plan
            split = plan.task.require("calibrate", "a search that cuts")
            count = min(DAMAGE_EXAMPLES, len(split))
            batches = [
                split.batch(range(start, min(start + DAMAGE_BATCH, count))) for start in range(0, count, DAMAGE_BATCH)
            ]
            self._damages = measure_damage(
                plan.original,
                self.material.space,
                batches,
                output=plan.task.output,
                loss=plan.task.loss,
                criterion=self.settings.criterion,
                seed=plan.seed,
                progress=lambda label, done, total, _=None: self.progress("damages", done, total),
            )
        return self._damages

    def _heal(self) -> None:
        self.lease.heal()


def _scaled(measured: Latency, reference: Latency, baseline: float) -> Latency:
    """Times beside a reference of `baseline` milliseconds: a machine that is slow now is slow for both."""
    median = baseline / paired_ratio(reference, measured)
    factor = median / measured.median
    return Latency(
        median=median,
        p95=measured.p95 * factor,
        iqr=measured.iqr * factor,
        n=measured.n,
        best=measured.best * factor,
        rounds=[value * factor for value in measured.rounds],
        histogram=[value * factor for value in measured.histogram],
    )


def _tell(record: TrialRecord) -> None:
    what = f"{len(record.choice.skipped)} blocks gone, {len(record.choice.widths)} families cut, {record.choice.format}"
    if record.status == "finished":
        logger.info(
            "trial %d, rung %d (%s): drop %.4f, %.3f ms",
            record.number,
            record.rung,
            what,
            record.drop,
            record.latency_ms,
        )
    else:
        logger.warning("trial %d, rung %d (%s): %s, %s", record.number, record.rung, what, record.status, record.reason)
