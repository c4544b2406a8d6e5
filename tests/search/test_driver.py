"""The search, on a machine and a model that are formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tersor.core.search import Choice, TrialRecord
from tersor.search.costs import CostTable, Point, design
from tersor.search.damage import DamageTable
from tersor.search.driver import Driver
from tersor.search.sampler import Sampler
from tersor.search.settings import Search
from tersor.search.space import Group, Space, Weight
from tersor.search.store import Job

BLOCKS = tuple(f"block{n}" for n in range(6))
SPACE = Space(
    groups=(
        *(Group(name, "block", (1, 0)) for name in BLOCKS),
        *(Group(f"{name}.units", "channel", (32, 24, 16, 8), inside=name) for name in BLOCKS),
    ),
    weights=(
        Weight("stem", "stem", 1000, 100, 1000),
        *(Weight(f"{b}.w", "w", 8000, 400, 2000, block=b, rows=((f"{b}.units", 1.0),)) for b in BLOCKS),
    ),
    formats=("float32", "int8"),
)
SPEED = {"float32": 1.0, "int8": 0.4}


def milliseconds(choice: Choice) -> float:
    return 0.1 + SPEED[choice.format] * SPACE.macs(choice) / 10_000


def harm(choice: Choice) -> float:
    """Of a choice before training; block 3 matters most."""
    options = SPACE.options(choice)
    blocks = sum(0.03 + 0.05 * (name == "block3") for name in choice.skipped)
    units = sum(0.02 * (1 - options[f"{name}.units"] / 32) for name in BLOCKS if name not in choice.skipped)
    return blocks + units


@dataclass
class World:
    """Formulas for a laboratory, with a limit on trials and a book."""

    most: int = 99
    fails: frozenset[int] = frozenset()
    book: dict[tuple[str, int], TrialRecord] = field(default_factory=dict)
    ran: int = 0

    def run(self, jobs: Sequence[Job]) -> list[TrialRecord]:
        found = []
        for job in jobs:
            key = job.choice.key, job.rung
            if key not in self.book:
                if self.ran >= self.most:
                    continue
                self.book[key] = self._trial(job)
                self.ran += 1
            found.append(self.book[key])
        return found

    def _trial(self, job: Job) -> TrialRecord:
        number = len(self.book)
        common = {"number": number, "choice": job.choice, "rung": job.rung, "source": job.source}
        if number in self.fails:
            return TrialRecord(**common, status="out of memory", reason="more than 1 GiB")
        drop = harm(job.choice) * 0.5**job.rung + (0.002 if job.choice.format == "int8" else 0.0)
        return TrialRecord(
            **common,
            status="finished",
            drop=drop,
            drop_bound=drop + 0.004,
            latency_ms=milliseconds(job.choice),
            predicted_ms=job.predicted_ms,
            predicted_drop=job.predicted_drop,
            size_bytes=1000,
            macs=int(SPACE.macs(job.choice)),
        )

    def costs(self, format: str) -> CostTable:
        points = [Point(c, milliseconds(c), 1000, int(SPACE.macs(c))) for c in design(SPACE, format, points=12)]
        return CostTable.fit(SPACE, format, points)

    def damages(self) -> DamageTable:
        alone = {
            group.name: {option: harm(SPACE.choice({group.name: option})) for option in group.options}
            for group in SPACE.groups
        }
        return DamageTable("drop", alone, {})


def search(world: World, **settings: object) -> Driver:
    driver = Driver(SPACE, Search(**{"trials": 6, "refine": 1, "finalists": 2, **settings}), 0.02, world, 0)
    driver.run()
    return driver


def fastest_inside(driver: Driver, limit: float) -> TrialRecord:
    return min(
        (r for r in driver.records if r.drop is not None and r.drop <= limit), key=lambda record: record.latency_ms
    )


def test_a_search_finds_something_much_faster_inside_the_aim() -> None:
    driver = search(World())
    best = fastest_inside(driver, 0.02)
    assert best.choice.format == "int8"
    assert best.latency_ms < 0.75 * milliseconds(Choice(format="int8"))
    assert "block3" not in best.choice.skipped
    assert {record.rung for record in driver.records} == {0, 1, 2}
    latencies = [record.latency_ms for record in driver.contenders()]
    assert latencies == sorted(latencies)


def test_the_program_beats_the_sampler_with_as_many_trials() -> None:
    assert (
        fastest_inside(search(World()), 0.02).latency_ms
        < fastest_inside(search(World(), strategy="sampler"), 0.02).latency_ms
    )


def test_latencies_are_predicted_before_they_are_measured() -> None:
    trained = [record for record in search(World()).records if record.choice.skipped or record.choice.widths]
    assert trained
    assert all(record.predicted_ms == pytest.approx(record.latency_ms, rel=0.05) for record in trained)


def test_a_replayed_search_ends_the_same() -> None:
    world = World()
    first = search(world)
    ran = world.ran
    again = search(world)
    assert world.ran == ran
    assert [r.number for r in again.contenders()] == [r.number for r in first.contenders()]
    assert search(World()).records == first.records


@pytest.mark.parametrize("stopped", range(1, 9))
def test_a_search_that_stopped_goes_on_where_it_was(stopped: int) -> None:
    whole = search(World())
    world = World(most=stopped)
    search(world)
    kept = dict(world.book)
    world.most = 99
    resumed = search(world)
    assert all(world.book[key] == record for key, record in kept.items())
    assert fastest_inside(resumed, 0.02).latency_ms <= 1.2 * fastest_inside(whole, 0.02).latency_ms


@pytest.mark.parametrize("fails", [{2}, {2, 3, 4}, {5, 6}])
def test_failed_trials_are_kept_and_the_rest_goes_on(fails: set[int]) -> None:
    driver = search(World(fails=frozenset(fails)))
    failed = [record for record in driver.records if record.status != "finished"]
    assert {record.number for record in failed} == fails
    assert all("more than 1 GiB" in record.reason for record in failed)
    assert fastest_inside(driver, 0.02).latency_ms < milliseconds(Choice(format="int8"))


def test_nothing_to_cut_compares_formats_only() -> None:
    world = World()
    driver = Driver(Space((), (), ("float32", "int8")), Search(), 0.02, world, 0)
    world_formats = [record.choice.format for record in driver.run()]
    assert world_formats == ["float32", "int8"]


@pytest.mark.parametrize("near", [False, True])
def test_the_sampler_draws_what_was_not_tried(near: bool) -> None:
    done = [record for record in search(World()).records if record.status == "finished"]
    sampler = Sampler(SPACE, "int8", seed=0)
    tried = [record.choice for record in done]
    drawn = sampler.ask(done, near=done[-2:] if near else (), without=tried)
    assert drawn is not None
    assert drawn.format == "int8"
    assert drawn.key not in {choice.key for choice in tried}
    again = Sampler(SPACE, "int8", seed=0).ask(done, near=done[-2:] if near else (), without=tried)
    assert again == drawn
    if near:
        here = SPACE.options(drawn)
        assert min(sum(SPACE.options(r.choice)[n] != here[n] for n in here) for r in done[-2:]) <= 3
