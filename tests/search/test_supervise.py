"""Functions in processes of their own: every way to end has its status, and nothing is left behind."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tersor import errors
from tersor.errors import ConfigError
from tersor.search.supervise import Ended, Limits, Pool, remove_scratch, supervise


def run(function: Callable[[], Any], log: Path, *, seconds: float | None = 30.0, **limits: Any) -> Ended:
    return supervise(function, seconds=seconds, **({"memory_bytes": None, "log": log, "threads": 1} | limits))


def lives(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def gone(processes: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(lives, processes))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "trial.log"


@pytest.fixture(autouse=True)
def _clean(log: Path) -> Any:
    yield
    if log.parent.exists():
        assert [entry.name for entry in log.parent.iterdir() if entry.name.startswith(".")] == []


def test_what_a_function_returns_comes_back(log: Path) -> None:
    table, groups = {"drop": 0.25, "names": ("a", "b")}, []

    def function() -> Any:
        print("said by the trial")
        return {**table, "threads": os.environ["OMP_NUM_THREADS"], "process": os.getpid(), "group": os.getpgrp()}

    ended = run(function, log, threads=3, on_start=groups.append)
    assert (ended.status, ended.reason) == ("finished", "")
    assert ended.value["drop"] == 0.25
    assert ended.value["names"] == ("a", "b")
    assert ended.value["threads"] == "3"
    assert ended.value["process"] != os.getpid()
    assert [ended.value["group"]] == groups
    assert 0 < ended.seconds < 30
    assert "said by the trial" in log.read_text()


def test_the_log_is_continued(log: Path) -> None:
    for word in ("first", "second"):
        run(lambda word=word: print(word), log)
    assert log.read_text().split() == ["first", "second"]


def test_an_exception_is_told_with_its_line(log: Path) -> None:
    def function() -> None:
        raise ValueError("expected 3 channels, got 4")

    ended = run(function, log)
    assert ended.status == "failed"
    # Some versions of cloudpickle send a function without its file: then its name stands where the text was.
    text = r'(raise ValueError\("expected 3 channels, got 4"\)|function)'
    assert re.fullmatch(rf"ValueError: expected 3 channels, got 4 \(\S+, line \d+: {text}\)", ended.reason)
    assert ended.value is None
    assert "Traceback" in log.read_text()


def test_an_exception_of_an_imported_module_is_told_with_its_file(log: Path) -> None:
    ended = run(lambda: json.loads("{"), log)
    assert ended.status == "failed"
    assert ended.reason.startswith("json.decoder.JSONDecodeError: ")
    assert re.search(r"\(decoder\.py, line \d+: obj, end = .+\)$", ended.reason)


def test_numbers_that_are_not_finite_have_a_status_of_their_own(log: Path) -> None:
    path = errors.__file__

    def function() -> None:
        # The file alone: the whole package takes seconds to import.
        spec = importlib.util.spec_from_file_location("tersor.errors", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        raise module.NonFiniteError("the loss is NaN in step 3")

    ended = run(function, log)
    assert ended.status == "not finite"
    assert "the loss is NaN in step 3" in ended.reason


def test_an_exit_is_a_failure(log: Path) -> None:
    assert run(lambda: sys.exit("gave up"), log).status == "failed"
    ended = run(lambda: (print("about to leave", flush=True), os._exit(3)), log)
    assert (ended.status, ended.reason) == (
        "failed",
        "its process ended with exit status 3; last words: about to leave",
    )
    ended = run(lambda: os.kill(os.getpid(), signal.SIGTERM), log)
    assert ended.status == "failed"
    assert "signal 15 (Terminated)" in ended.reason


def test_what_cannot_be_sent_or_returned_is_told(log: Path) -> None:
    held = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent to a process of its own"):
        run(lambda: held.locked(), log)
    ended = run(lambda: threading.Lock(), log)
    assert ended.status == "failed"
    assert "cannot pickle" in ended.reason


def test_time_is_limited_and_grandchildren_end_with_it(log: Path, tmp_path: Path) -> None:
    note = tmp_path / "processes"

    def function() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)

    ended = run(function, log, seconds=1.0)
    assert (ended.status, ended.reason) == ("timeout", "took longer than 1 s")
    assert 1.0 <= ended.seconds < 10
    assert gone([int(word) for word in note.read_text().split()], seconds=0)


def test_grandchildren_end_with_a_function_that_returns(log: Path) -> None:
    def function() -> list[int]:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        groups = ({}, {"process_group": 0})  # the second leaves the group
        return [subprocess.Popen(command, **group).pid for group in groups]  # noqa: S603 - our own interpreter

    ended = run(function, log)
    assert ended.status == "finished"
    assert len(ended.value) == 2
    assert gone(ended.value, seconds=0)


def test_threads_that_still_run_do_not_keep_it(log: Path) -> None:
    def function() -> str:
        threading.Thread(target=time.sleep, args=(600,)).start()
        return "done"

    assert run(function, log).value == "done"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is watched in /proc")
def test_memory_is_limited(log: Path) -> None:
    def function() -> None:
        held = []
        while True:
            held.append(b"\x01" * (16 << 20))
            time.sleep(0.02)

    ended = run(function, log, memory_bytes=300_000_000)
    assert ended.status == "out of memory"
    assert "MB resident, more than 300 MB" in ended.reason


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is watched in /proc")
def test_pages_that_processes_share_count_once(log: Path) -> None:
    def function() -> str:
        held = b"\x01" * (64 << 20)
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                time.sleep(600)
            children.append(child)
        time.sleep(1.5)
        return f"{len(held)} bytes in {len(children) + 1} processes"

    assert run(function, log, memory_bytes=300_000_000).value == f"{64 << 20} bytes in 7 processes"


def test_an_allocation_that_fails_is_out_of_memory(log: Path) -> None:
    assert run(lambda: len(bytearray(1 << 60)), log).status == "out of memory"


def test_a_kill_from_outside_is_told(log: Path) -> None:
    ended = run(lambda: os.kill(os.getpid(), signal.SIGKILL), log)
    assert ended.status == "killed"
    assert "signal 9 from outside" in ended.reason
    assert run(lambda: os.killpg(0, signal.SIGKILL), log).status == "killed"


def test_poll_is_called_and_may_end_it(log: Path) -> None:
    calls, groups = [], []
    run(lambda: time.sleep(1.6), log, poll=lambda: calls.append(time.monotonic()))
    assert len(calls) == 1

    def poll() -> None:
        raise RuntimeError("the lease is lost")

    with pytest.raises(RuntimeError, match="the lease is lost"):
        run(lambda: time.sleep(600), log, poll=poll, on_start=groups.append)
    assert gone(groups, seconds=0)


def test_a_pool_runs_several_at_once(log: Path) -> None:
    with Pool(2, threads=5) as pool:
        assert pool.threads == 2
        started = time.monotonic()
        for index in range(4):
            pool.submit(f"{index}", lambda index=index: (time.sleep(1.0), index)[1], Limits(log, seconds=30))
        found = []
        for name, ended in pool.as_completed():
            found.append((name, ended.value))
            if name == "0":
                pool.submit("late", lambda: 1 / 0, Limits(log))
        assert sorted(found) == [("0", 0), ("1", 1), ("2", 2), ("3", 3), ("late", None)]
        assert time.monotonic() - started < 4.0
        assert list(pool.as_completed()) == []


def test_closing_a_pool_kills_what_runs(log: Path) -> None:
    groups: list[int] = []
    with Pool(2, threads=1) as pool:
        assert pool.threads == 1
        for index in range(5):
            pool.submit(f"{index}", lambda: time.sleep(600), Limits(log, on_start=groups.append))
        while len(groups) < 2:
            time.sleep(0.01)
    assert len(groups) == 2
    assert gone(groups, seconds=0)


def test_what_a_parent_left_before_it_had_a_child_is_swept(log: Path) -> None:
    run(lambda: None, log)
    assert remove_scratch(log.parent) == 0
    left = log.parent / ".supervised-left"
    left.mkdir()
    (left / "function").write_bytes(b"half of a model")
    assert remove_scratch(log.parent) == 1
    assert [entry.name for entry in log.parent.iterdir()] == [log.name]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_a_pool_needs_workers_and_threads(numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="at least one worker and one thread"):
        Pool(numbers[0], threads=numbers[1])


# The worker computes without ever letting go of the interpreter's lock, as a long operator does.
PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from tersor.search.supervise import supervise
note, log = Path(sys.argv[1]), Path(sys.argv[2])
def function():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note.with_suffix(".new").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
    note.with_suffix(".new").rename(note)
    sum(range(10**12))
supervise(function, seconds=None, memory_bytes=None, log=log, threads=1)
"""


def test_nothing_outlives_a_parent_that_is_killed(log: Path, tmp_path: Path) -> None:
    note = tmp_path / "processes"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(note), str(log)])  # noqa: S603 - our own
    with parent:
        while not note.exists():
            assert parent.poll() is None
            time.sleep(0.02)
        processes = [int(word) for word in note.read_text().split()]
        assert all(map(lives, processes))
        parent.kill()
    assert gone(processes)
