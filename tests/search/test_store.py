"""Trials in SQLite: nothing is lost, nothing is run twice."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.core.search import Choice, TrialRecord
from tersor.errors import ConfigError, IntegrityError, OutputDirectoryError, RuntimeUnavailableError
from tersor.search.database import connect
from tersor.search.space import BLOCK, Group, Space
from tersor.search.store import FORMAT, Job, TrialStore, distributions, lock

SPACE = Space(
    groups=(
        Group("layer1.0", BLOCK, (1, 0)),
        Group("layer2.0", BLOCK, (1, 0)),
        Group("fc1.weight[0]", "channel", (16, 12, 8, 4)),
        Group("layer2.0.conv.weight[0]", "hidden", (8, 4, 2), inside="layer2.0"),
    ),
    weights=(),
    formats=("float32", "int8"),
)
IDENTITY = {"model": "a" * 16, "task": "b" * 16, "target": "eager", "budget": "1 %", "seed": "0"}


def choices() -> list[Choice]:
    """All that differ: 4 widths times (3 widths of a block that stays, or none) times a block times two formats."""
    found = {}
    for first in (1, 0):
        for second in (1, 0):
            for wide in (16, 12, 8, 4):
                for inner in (8, 4, 2):
                    for format in SPACE.formats:
                        options = {
                            "layer1.0": first,
                            "layer2.0": second,
                            "fc1.weight[0]": wide,
                            "layer2.0.conv.weight[0]": inner,
                        }
                        choice = SPACE.choice(options, format)
                        found[choice.key] = choice
    return list(found.values())


CHOICES = choices()


def job(index: int, rung: int = 0) -> Job:
    return Job(CHOICES[index], rung, "program", predicted_drop=0.01 * index, predicted_ms=1.0)


def record(number: int, index: int, rung: int = 0, **fields: object) -> TrialRecord:
    facts = {
        "status": "finished",
        "drop": 0.001 * index,
        "latency_ms": 10.0 / (index + 1),
        "recipe": {"steps": [{"name": "structured", "amount": 0.1 + 0.2, "note": "ö" * 40}]},
        "size_bytes": 1000 + index,
        "seconds": 0.25,
    }
    return TrialRecord(number=number, choice=CHOICES[index], rung=rung, source="program", **(facts | fields))


def filled(path: Path, count: int) -> list[TrialRecord]:
    written = []
    with TrialStore(path, IDENTITY, SPACE) as store:
        for index in range(count):
            number = store.start(job(index))
            assert number == index
            written.append(record(number, index))
            store.finish(written[-1])
    return written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "trials.sqlite"


def test_what_was_finished_is_found_again_and_not_started_again(path: Path) -> None:
    written = filled(path, 5)
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.finished() == written
        assert store.start(job(3)) is None
        assert store.start(job(3, rung=1)) == 5
        assert store.start(job(3, rung=1)) is None


def test_the_order_in_which_a_choice_was_written_down_does_not_matter(path: Path) -> None:
    names = ("layer1.0", "layer2.0")
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.start(Job(Choice(skipped=names), 0, "program")) == 0
        assert store.start(Job(Choice(skipped=names[::-1]), 0, "sampler")) is None


def test_failed_trials_are_kept_with_their_reason_and_not_repeated(path: Path) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        number = store.start(job(0))
        failed = record(number, 0, status="timeout", reason="took longer than 5 s", drop=None, latency_ms=None)
        store.finish(failed)
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.finished() == [failed]
        assert store.start(job(0)) is None
        assert [trial.state for trial in store.study.trials] == [optuna.trial.TrialState.FAIL]


def test_finishing_twice_does_nothing_and_otherwise_is_refused(path: Path) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        number = store.start(job(0))
        store.finish(record(number, 0))
        store.finish(record(number, 0))
        assert store.finished() == [record(number, 0)]
        with pytest.raises(OutputDirectoryError, match="trial 0 has ended already, with another result"):
            store.finish(record(number, 0, drop=0.5))
        assert store.finished() == [record(number, 0)]


@pytest.mark.parametrize("wrong", [{"number": 7}, {"index": 1}, {"rung": 1}])
def test_only_what_was_started_can_be_finished(path: Path, wrong: dict[str, int]) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        store.start(job(0))
        with pytest.raises(ConfigError, match="no such choice was started"):
            store.finish(record(**({"number": 0, "index": 0} | wrong)))
        assert store.finished() == []


@pytest.mark.parametrize("wrong", [{"drop": None}, {"latency_ms": None}, {"drop": float("nan")}])
def test_a_finished_trial_has_both_numbers(path: Path, wrong: dict[str, float | None]) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        store.start(job(0))
        with pytest.raises(ConfigError, match="a finished trial has a finite drop and latency_ms"):
            store.finish(record(0, 0, **wrong))
        store.finish(record(0, 0))


def test_what_the_space_does_not_have_is_refused(path: Path) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        with pytest.raises(ConfigError, match=r"has no \['layer9'\]"):
            store.start(Job(Choice(skipped=("layer9",)), 0, "program"))
        with pytest.raises(ConfigError, match="expected a format"):
            store.start(Job(Choice(format="int3"), 0, "program"))
        assert store.study.trials == []


def test_another_search_is_told_by_what_differs(path: Path) -> None:
    filled(path, 1)
    with pytest.raises(OutputDirectoryError, match="holds another search: its budget, seed differ"):
        TrialStore(path, IDENTITY | {"seed": "1", "budget": "2 %"}, SPACE)
    smaller = Space(SPACE.groups[:2], (), SPACE.formats)
    with pytest.raises(OutputDirectoryError, match="its search space differ"):
        TrialStore(path, IDENTITY, smaller)
    with pytest.raises(OutputDirectoryError, match="its search space differ"):
        TrialStore(path, IDENTITY, Space(SPACE.groups, (), ("float32",)))
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert len(store.finished()) == 1
    assert not list(path.parent.glob(".*.alive"))


def test_samplers_can_learn_from_the_study(path: Path) -> None:
    filled(path, 8)
    with TrialStore(path, IDENTITY, SPACE) as store:
        first = store.study.trials[7]
        assert first.params == {**SPACE.options(CHOICES[7]), FORMAT: CHOICES[7].format}
        assert first.values == [record(7, 7).drop, record(7, 7).latency_ms]
        assert {trial.number for trial in store.study.best_trials} == set(range(8))
        learned = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.TPESampler(seed=0))
        learned.add_trials(store.study.trials)
        asked = learned.ask(distributions(SPACE))
        assert asked.params[FORMAT] in SPACE.formats
        assert asked.params["fc1.weight[0]"] in (16, 12, 8, 4)


def test_nothing_is_printed(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    filled(path, 2)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == verbosity


def test_a_path_may_have_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "100% {a} ?b=c #d" / "tri'als ö.sqlite"
    written = filled(path, 2)
    assert path.exists()
    with TrialStore(str(path), IDENTITY, SPACE) as store:
        assert store.finished() == written


def test_commits_reach_the_disk(path: Path) -> None:
    filled(path, 1)
    backend = connect(path)
    with backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    backend.engine.dispose()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot write"):
        TrialStore(tmp_path / "file" / "trials.sqlite", IDENTITY, SPACE)


def test_urls() -> None:
    with pytest.raises(ConfigError, match="give the path of the file"):
        TrialStore("sqlite:///trials.sqlite", IDENTITY, SPACE)
    with pytest.raises(ConfigError, match="the URL cannot be read"):
        TrialStore("://", IDENTITY, SPACE)
    with pytest.raises(RuntimeUnavailableError, match=r"the driver .* is not installed") as caught:
        TrialStore("postgresql+nodriver://me:secret@host/database", IDENTITY, SPACE)
    assert "secret" not in str(caught.value)


def test_threads_with_stores_of_their_own_start_each_trial_once(path: Path) -> None:
    started: SimpleQueue[tuple[str, int]] = SimpleQueue()
    filled(path, 0)

    def search() -> None:
        with TrialStore(path, IDENTITY, SPACE) as store:
            for index in range(8):
                number = store.start(job(index))
                if number is not None:
                    started.put((CHOICES[index].key, number))
                    store.finish(record(number, index))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [started.get() for _ in range(started.qsize())]
    assert sorted(key for key, _ in found) == sorted(choice.key for choice in CHOICES[:8])
    assert sorted(number for _, number in found) == list(range(8))


# Imports once, then forks: three processes race, and at the end one holds a trial and the directory until killed.
SEARCH = """
import os, sys, time
from pathlib import Path
import test_store as t
path = Path(sys.argv[1])
def race():
    with t.TrialStore(path, t.IDENTITY, t.SPACE) as store:
        for index in range(6):
            for rung in (0, 1):
                number = store.start(t.job(index, rung))
                if number is not None:
                    store.finish(t.record(number, index, rung))
workers = []
for _ in range(3):
    worker = os.fork()
    if worker == 0:
        race()
        os._exit(0)
    workers.append(worker)
assert [os.waitpid(worker, 0)[1] for worker in workers] == [0, 0, 0]
store = t.TrialStore(path, t.IDENTITY, t.SPACE)
with t.lock(path.parent):
    print(store.start(t.job(10)), store.start(t.job(11)), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str], str]]:
    path = tmp_path_factory.mktemp("searching") / "trials.sqlite"
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", SEARCH, str(path)], stdout=subprocess.PIPE, text=True, env=os.environ | here
    )
    assert process.stdout is not None
    with process:
        yield path, process, process.stdout.readline()
        process.kill()


def test_processes_that_race_and_die(searching: tuple[Path, subprocess.Popen[str], str]) -> None:
    path, process, said = searching
    assert said.split() == ["12", "13"]
    with TrialStore(path, IDENTITY, SPACE) as store:
        done = [(found.choice.key, found.rung) for found in store.finished()]
        assert sorted(done) == sorted((CHOICES[index].key, rung) for index in range(6) for rung in (0, 1))
        # While it lives, its trials and its directory are its own.
        assert store.start(job(10)) is None
        assert store.abandon_stale() == []
        with (
            pytest.raises(OutputDirectoryError, match=f"is being searched by process {process.pid};"),
            lock(path.parent),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock(path.parent):
            assert store.start(job(10)) == 14
            assert store.abandon_stale() == [13]
            assert store.abandon_stale() == []
        states = {trial.number: trial.state.name for trial in store.study.trials[12:]}
        assert states == {12: "FAIL", 13: "FAIL", 14: "RUNNING"}
        assert len(store.finished()) == 12
        assert store.start(job(11)) == 15
        assert len(list(path.parent.glob(".*.alive"))) == 1


def test_a_directory_is_searched_once_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        with (
            pytest.raises(OutputDirectoryError, match=f"is being searched by process {os.getpid()};"),
            lock(tmp_path / "run"),
        ):
            pass
        with lock(tmp_path / "other"):
            pass
    with lock(tmp_path / "run"):
        pass


def test_what_a_closed_store_left_running_may_be_started_again(path: Path) -> None:
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.start(job(0)) == 0
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.abandon_stale() == [0]
        assert store.start(job(0)) == 1


def test_a_record_that_was_complete_when_the_process_died_counts(path: Path) -> None:
    written = filled(path, 3)
    with closing(sqlite3.connect(path)) as connection, connection:
        # Between the two writes of `finish`: the record is there, the state is not.
        connection.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 1")
        connection.execute("DELETE FROM trial_values WHERE trial_id = 2")
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.finished() == [written[0], written[2]]
        assert store.abandon_stale() == []
        assert store.finished() == written
        assert store.study.trials[1].values == [written[1].drop, written[1].latency_ms]
        assert store.start(job(1)) is None


CHANGES = {
    "record": "UPDATE trial_user_attributes SET value_json = replace(value_json, '0.001', '0.000') WHERE trial_id = 2",
    "claim": "UPDATE trial_user_attributes SET value_json = '[\"?\", 0]' WHERE trial_id = 2 AND key = 'claim'",
    "no text": "UPDATE trial_user_attributes SET value_json = CAST(x'7bff' AS TEXT) WHERE trial_id = 2",
    "key": "UPDATE trial_user_attributes SET key = 'recorf' WHERE trial_id = 2 AND key = 'record'",
    "number": "UPDATE trials SET number = 7 WHERE trial_id = 2",
    "value": "UPDATE trial_values SET value = value / 2 WHERE trial_id = 2",
    "parameter": "UPDATE trial_params SET distribution_json = '{' WHERE trial_id = 2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_content_is_noticed_on_opening(path: Path, change: str) -> None:
    written = filled(path, 3)
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(CHANGES[change]).rowcount
    with TrialStore(path, IDENTITY, SPACE) as store:
        found = store.finished()
        lost = change in {"record", "no text", "key"}
        assert found == [written[0], *([] if lost else [written[1]]), written[2]]
        assert (store.start(job(1)) is not None) == lost
    assert path.with_name("trials.sqlite.damaged-1").exists()


def test_a_change_while_the_store_is_open_is_noticed(path: Path) -> None:
    filled(path, 0)
    with TrialStore(path, IDENTITY, SPACE) as store:
        filled(path, 2)
        with closing(sqlite3.connect(path)) as connection, connection:
            assert connection.execute(CHANGES["record"]).rowcount
        with pytest.raises(IntegrityError, match="the record of trial 1 was changed"):
            store.finished()


@dataclass(frozen=True, repr=False)
class Intact:
    content: bytes
    written: list[TrialRecord]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Intact:
    path = tmp_path_factory.mktemp("intact") / "trials.sqlite"
    written = filled(path, 16)
    return Intact(path.read_bytes(), written)


def test_a_truncated_file_gives_back_what_is_left(path: Path, intact: Intact, caplog: pytest.LogCaptureFixture) -> None:
    content, written = intact.content, intact.written
    path.parent.mkdir()
    path.write_bytes(content[: len(content) - 3 * 4096])
    with TrialStore(path, IDENTITY, SPACE) as store:
        found = store.finished()
        assert 0 < len(found) < len(written)
        assert all(written[item.number] == item for item in found)
        lost = sorted({item.number for item in written} - {item.number for item in found})
        # What is lost runs again under a new number; what was found does not.
        again = store.start(job(lost[0]))
        assert again is not None
        assert again not in {item.number for item in found}
        assert store.start(job(found[0].number)) is None
        assert store.study.trials[found[-1].number].values == [found[-1].drop, found[-1].latency_ms]
    assert f"{len(found)} trial(s)" in caplog.text
    assert (path.parent / "trials.sqlite.damaged-1").read_bytes() == content[: len(content) - 3 * 4096]
    with TrialStore(path, IDENTITY, SPACE) as store:
        assert store.finished() == found


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), length=st.integers(1, 9000), byte=st.integers(0, 255))
def test_damage_never_invents_a_trial(tmp_path: Path, intact: Intact, place: float, length: int, byte: int) -> None:
    content, written = intact.content, intact.written
    start = int(place * (len(content) - 1))
    end = min(len(content), start + length)
    path = tmp_path / f"{start} {end} {byte}.sqlite"
    path.write_bytes(content[:start] + bytes([byte]) * (end - start) + content[end:])
    try:
        with TrialStore(path, IDENTITY, SPACE) as store:
            found = store.finished()
    except (IntegrityError, OutputDirectoryError):  # nothing is left, or not what was searched: refused
        return
    assert found
    assert all(written[item.number] == item for item in found)


@pytest.mark.parametrize("content", [b"", b"no database at all" * 500], ids=["empty", "foreign"])
def test_what_cannot_be_recovered_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="remove it to start anew"):
        TrialStore(path, IDENTITY, SPACE)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match="holds no search"):
        TrialStore(path, IDENTITY, SPACE)
    assert path.read_bytes() == before


def test_a_damaged_file_of_another_search_is_not_taken(path: Path, intact: Intact) -> None:
    content = intact.content
    path.parent.mkdir()
    path.write_bytes(content[: len(content) - 3 * 4096])
    with pytest.raises(OutputDirectoryError, match="its seed differ"):
        TrialStore(path, IDENTITY | {"seed": "1"}, SPACE)
    assert path.read_bytes() == content[: len(content) - 3 * 4096]
