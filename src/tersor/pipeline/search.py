"""Searches for the fastest recipe that can be certified, and certifies it.

Tables and trials look at the train, calibrate and search splits; the certify split is asked once, by the ladder; the
report split sees the winner alone.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tersor.core.candidate import Candidate
from tersor.core.certificate import Certificate
from tersor.core.context import Progress
from tersor.core.files import write_whole
from tersor.core.recipe import Recipe
from tersor.core.search import Ladder, SearchRecord, TrialRecord
from tersor.errors import ConfigError, CoverageError, SplitTooSmallError
from tersor.measure.accuracy import score_bounds
from tersor.measure.ladder import Contender, chosen, climb, order, reachable
from tersor.measure.ledger import NAME, ask, level_of, read
from tersor.pipeline.laboratory import Laboratory
from tersor.pipeline.measuring import (
    Exported,
    certificate_at,
    compare,
    evaluate_original,
    export,
    question,
)
from tersor.pipeline.plan import Plan
from tersor.pipeline.run_directory import RunDirectory
from tersor.pipeline.trial import EXPORTED, Material
from tersor.search.defaults import SCHEDULES, formats_for
from tersor.search.discover import discover
from tersor.search.driver import Driver
from tersor.search.family import FamilyName, family_of
from tersor.search.settings import Search
from tersor.search.space import Space
from tersor.search.store import TrialStore, lock
from tersor.search.supervise import remove_scratch
from tersor.train import Schedule

logger = logging.getLogger("tersor")

SEARCH = "search"
MARGIN = 0.3  # of the budget, where the certify split's power is not known in closed form
METHODS = {
    "program": "integer program over measured costs and damages, refined by a sampler",
    "sampler": "Optuna's sampler alone",
    "once-for-all": "slices of one super-network, chosen by an integer program",
}


@dataclass(frozen=True)
class Found:
    """What a search hands back.

    Attributes:
        plan: The run's plan with the recipe that was found.
        candidate: The compressed model.
        files: Its model files, as they were certified.
        certificate: Of these files.
        record: For the report.
    """

    plan: Plan
    candidate: Candidate
    files: Path
    certificate: Certificate
    record: SearchRecord


def searched(plan: Plan, run: RunDirectory, progress: Progress) -> Found:
    """Runs or resumes the search of a plan.

    Raises:
        ConfigError: without a budget to stay inside.
        DataError: if a split is missing.
        SplitTooSmallError: if the certify split could prove nothing that a search may find.
        OutputDirectoryError: if the directory is being searched already, or holds another search.
    """
    settings = plan.search
    if settings is None or plan.budget.max_drop is None:
        raise ConfigError("a search needs Budget(max_drop=...): the fastest model inside no budget is an empty one")
    directory = run.path / SEARCH
    aim = _kept_aim(plan, plan.budget.max_drop, run.path.absolute().parent / NAME, directory / "aim.json")
    with lock(directory), tempfile.TemporaryDirectory(prefix="tersor-search-") as scratch:
        private = Path(scratch)
        remove_scratch(directory / "trials")  # what a search that was killed left beside the logs
        family = family_of(plan.original, plan.task)
        formats = settings.formats or formats_for(family, plan.runtime)
        space = _space(plan, settings, formats)
        material = Material(plan, space, evaluate_original(plan, plan.task.require("search", "a search"), progress),
                            run.identity, directory / "trials")  # fmt: skip
        (private / "uncompressed").mkdir()
        uncompressed = export(plan, Candidate(plan.original), private / "uncompressed")
        location = settings.storage or directory / "trials.sqlite"
        with TrialStore(location, run.fingerprint, space, name=run.identity) as store:
            lab = Laboratory(
                material=material,
                saved=material.save(private / "material"),
                uncompressed=uncompressed.loaded,
                settings=settings,
                family=family,
                store=store,
                seconds_per_step=_seconds_per_step(plan, settings, family),
                progress=progress,
            )
            lab.train_foundation()
            driver = Driver(space, settings, aim, lab, plan.seed)
            driver.run()
            return _ended(driver, lab, run, progress)


def _kept_aim(plan: Plan, max_drop: float, ledger: Path, kept: Path) -> float:
    """The aim of the first call: the ledger grows, by this search's own question too, and choices follow from it."""
    if not kept.exists():
        write_whole(kept, json.dumps(_aim(plan, max_drop, ledger)).encode())
    return float(json.loads(kept.read_text()))


def _aim(plan: Plan, max_drop: float, ledger: Path) -> float:
    """The largest drop that the certify split probably proves to be inside the budget, after what was asked of it."""
    split = plan.task.require("certify", "a budget with max_drop")
    if plan.task.metric.aggregate is not None or score_bounds(plan.task.metric) != (0.0, 1.0):
        return max_drop * (1 - MARGIN)
    asked = len({entry["run"] for entry in read(ledger) if entry["split"] == split.fingerprint})
    aim = reachable(len(split), max_drop, confidence=level_of(plan.budget.confidence, asked + 1))
    if aim <= 0:
        raise SplitTooSmallError(
            f"split 'certify' has {len(split)} examples: where one answer in twenty flips, not even a model that is as "
            f"good as the original would probably be certified at a drop of {max_drop:g}. Give it more examples or "
            "allow a larger max_drop"
        )
    return aim


def _space(plan: Plan, settings: Search, formats: tuple[str, ...]) -> Space:
    if settings.kinds == ():
        return Space((), (), tuple(formats))
    logger.info("search: finding out, and proving, what can be cut")
    try:
        space = discover(plan.original, plan.task, formats=formats, kinds=settings.kinds)
        logger.info("search: %d decisions, formats %s", len(space.groups), ", ".join(formats))
        return space
    except CoverageError as error:
        return Space((), (), tuple(formats), (str(error),))


def _seconds_per_step(plan: Plan, settings: Search, family: FamilyName) -> float:
    """Of training the whole model with the original beside it; the median of three steps."""
    schedule: Schedule = settings.schedule or SCHEDULES[family]
    split = plan.task.get("train")
    if split is None:
        return 1.0
    batch = split.batch(range(min(schedule.batch_size, len(split))))
    module = copy.deepcopy(plan.original).requires_grad_(True).train()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            batch.call(plan.original)
        answer = batch.call(module)
        first = answer if isinstance(answer, torch.Tensor) else next(iter(_tensors(answer)))
        first.float().square().mean().backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _tensors(answer: object) -> list[torch.Tensor]:
    values = answer.values() if isinstance(answer, dict) else answer
    return [value for value in values if isinstance(value, torch.Tensor)]  # type: ignore[attr-defined]


def _ended(driver: Driver, lab: Laboratory, run: RunDirectory, progress: Progress) -> Found:
    """Certifies along the front and puts everything together."""
    plan, records = lab.material.plan, {record.number: record for record in driver.records}
    contenders = order(
        Contender(r.number, r.latency_ms, r.drop, r.drop_bound)
        for r in records.values()
        if r.latency_ms is not None and r.drop is not None and r.drop_bound is not None
    )
    if not contenders:
        reasons = "; ".join(f"{r.status}: {r.reason}" for r in driver.records[:3])
        raise ConfigError(f"no trial of the search finished ({reasons}); see the logs in {lab.material.directory}")
    split = plan.task.require("certify", "a search")
    models = [_files(lab, records[contender.trial]) for contender in contenders]
    ledger = run.path.absolute().parent / NAME
    asked = ask(ledger, split=split.fingerprint, run=question(run.identity, models))
    level = level_of(plan.budget.confidence, asked)
    original = evaluate_original(plan, split, progress)
    certificates: dict[int, Certificate] = {}

    def test(contender: Contender) -> Certificate:
        record = records[contender.trial]
        compared = compare(plan, _exported(lab, record), split, progress, original)
        certificates[contender.trial] = certificate_at(plan, compared, level=level, times_asked=asked)
        return certificates[contender.trial]

    ladder = climb(contenders, test, confidence=plan.budget.confidence, level=level, times_asked=asked)
    winner = chosen(ladder)
    best = records[contenders[0].trial if winner is None else winner]
    steps = lab.steps(best.choice, best.rung)
    candidate = lab.material.candidate(steps, best.choice, best.rung)
    return Found(
        plan=replace(plan, recipe=Recipe(steps, name=f"search-{best.choice.key}")),
        candidate=candidate,
        files=lab.material.run_of(best.choice, best.rung).path / EXPORTED,
        certificate=certificates[best.number],
        record=_record(driver, lab, ladder, best),
    )


def _files(lab: Laboratory, record: TrialRecord) -> list[Path]:
    directory = lab.material.run_of(record.choice, record.rung).path / EXPORTED
    return [path for path in directory.rglob("*") if path.is_file()]


def _exported(lab: Laboratory, record: TrialRecord) -> Exported:
    steps = lab.steps(record.choice, record.rung)
    return Exported(lab.material.loaded(steps, record.choice, record.rung), Candidate(lab.material.plan.original), ())


def _record(driver: Driver, lab: Laboratory, ladder: Ladder, best: TrialRecord) -> SearchRecord:
    notes = [] if driver.space.groups else ["nothing of this model can be cut; only number formats were compared"]
    if lab.left <= 0:
        notes.append("the time was over before all trials had run")
    return SearchRecord(
        minutes=driver.settings.minutes,
        seconds=lab.seconds,
        seed=driver.seed,
        method=METHODS[driver.settings.strategy],
        original_metric=lab.material.original.value,
        baseline_ms=lab.baseline_ms,
        decisions=len(driver.space.groups),
        frozen=list(driver.space.frozen),
        costs=[table.record() for table in driver.tables.values()],
        damages=None if driver.damage is None else driver.damage.record(driver.space),
        trials=driver.records,
        front=[record.number for record in driver.contenders()],
        ladder=ladder,
        chosen=best.number,
        notes=notes,
    )
