"""Runs a function in a process of its own, within limits of time and memory, and leaves no process behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import cloudpickle

from tersor.core.search import Status
from tersor.errors import ConfigError
from tersor.search import child

_TICK = 0.2  # seconds between looks at the memory
_SECOND = 1.0  # between calls of `poll`, and between searches for new processes of the group
_LAST = 5.0  # seconds that killed processes may take to be gone
_PROC = Path("/proc")
_SCRATCH = ".supervised-"


@dataclass(frozen=True)
class Ended:
    """What became of a function.

    Attributes:
        status: `finished`, or why not.
        value: What the function returned; None unless it finished.
        reason: Of a failure; empty after success.
        seconds: From the start of the process to its end.
    """

    status: Status
    value: Any
    reason: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """What a function may take.

    Attributes:
        log: File that gets what the function prints, after what is in it already.
        seconds: That it may take, starting the process included.
        memory_bytes: That all of its processes together may have resident; watched where there is /proc (Linux).
        on_start: Called once with the process group.
        poll: Called about once a second while the function runs; what it raises ends the function and is raised.
    """

    log: Path
    seconds: float | None = None
    memory_bytes: int | None = None
    on_start: Callable[[int], None] | None = None
    poll: Callable[[], None] | None = None


def supervise(
    function: Callable[[], Any],
    *,
    seconds: float | None,
    memory_bytes: int | None,
    log: Path,
    threads: int,
    on_start: Callable[[int], None] | None = None,
    poll: Callable[[], None] | None = None,
) -> Ended:
    """Runs a function in a fresh interpreter and says what became of it.

    The function's processes are a process group of their own. All of them are killed when the function has
    returned, when a limit is passed, and when this process dies, be it by `kill -9`.

    ::

        ended = supervise(lambda: train(model), seconds=600, memory_bytes=8 << 30, log=Path("trial.log"), threads=2)

    Status: an exception is `failed`, `NonFiniteError` is `not finite`; an allocation that fails, or more than
    `memory_bytes`, is `out of memory`; a kill from outside, as by the kernel when memory runs out, is `killed`.

    Args:
        function: Whatever cloudpickle can send; what it returns likewise.
        seconds: See `Limits`; so are `memory_bytes`, `log`, `on_start` and `poll`.
        memory_bytes: See `Limits`.
        log: See `Limits`.
        threads: That the function may compute with.
        on_start: See `Limits`.
        poll: See `Limits`.

    Raises:
        ConfigError: if the function cannot be pickled.
    """
    return _run(function, Limits(log, seconds, memory_bytes, on_start, poll), threads, threading.Event())


class Pool:
    """Runs up to `workers` supervised functions at once, each with `threads // workers` threads, but at least one.

    ::

        with Pool(2, threads=4) as pool:
            pool.submit("first", function, Limits(Path("first.log"), seconds=60))
            for name, ended in pool.as_completed():
                ...

    Leaving the context kills what still runs.

    Raises:
        ConfigError: if there is no worker or no thread.
    """

    def __init__(self, workers: int, *, threads: int) -> None:
        if workers < 1 or threads < 1:
            raise ConfigError(f"pool: expected at least one worker and one thread, got {workers} and {threads}")
        self.threads = max(1, threads // workers)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="trial")
        self._ended: SimpleQueue[tuple[str, Future[Ended]]] = SimpleQueue()
        self._outstanding = 0
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, name: str, function: Callable[[], Any], limits: Limits) -> None:
        """Runs a function as soon as a worker is free; see `supervise`."""
        future = self._executor.submit(_run, function, limits, self.threads, self._stop)
        self._outstanding += 1
        future.add_done_callback(lambda done: self._ended.put((name, done)))

    def as_completed(self) -> Iterator[tuple[str, Ended]]:
        """What was submitted, as it ends; also what is submitted meanwhile.

        Raises:
            ConfigError: if a function cannot be pickled.
        """
        while self._outstanding:
            name, future = self._ended.get()
            self._outstanding -= 1
            yield name, future.result()

    def close(self) -> None:
        """Kills what runs, forgets what waits."""
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)


def remove_scratch(directory: Path) -> int:
    """Removes what parents that were killed have left beside their logs, and counts it.

    A guard removes its own; this is for parents that died before they had one, or after it had ended. Nobody may be
    running functions that log to this directory: call it with the search's lock held.
    """
    left = [entry for entry in directory.glob(f"{_SCRATCH}*") if entry.is_dir()]
    for entry in left:
        shutil.rmtree(entry, ignore_errors=True)
    return len(left)


def _run(function: Callable[[], Any], limits: Limits, threads: int, stop: threading.Event) -> Ended:
    started = time.monotonic()
    limits.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=limits.log.parent, ignore_cleanup_errors=True) as name,
        limits.log.open("ab") as log,
    ):
        scratch = Path(name)
        _send(function, scratch / child.PAYLOAD)
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and file, no shell
            [sys.executable, "-P", child.__file__, str(scratch.absolute()), str(os.getpid()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
                "OMP_NUM_THREADS": str(threads),
            },
            start_new_session=True,
        )
        try:
            if limits.on_start is not None:
                limits.on_start(process.pid)
            stopped = _watch(process, limits, started, stop)
        finally:
            _end(process)
        status, reason, value = stopped or _result(scratch, limits.log)
        return Ended(status, value, reason, time.monotonic() - started)


def _send(function: Callable[[], Any], path: Path) -> None:
    with path.open("wb") as stream:
        try:
            cloudpickle.dump(function, stream)
        except Exception as error:
            raise ConfigError(
                f"trial: the function cannot be sent to a process of its own ({error}); it and what it refers to must "
                "be picklable: no hooks, open files or locks"
            ) from error


Outcome = tuple[Status, str, Any]


def _watch(process: subprocess.Popen[bytes], limits: Limits, started: float, stop: threading.Event) -> Outcome | None:
    """Waits for the end; None if it came by itself."""
    session, polled = _Session(process.pid), time.monotonic()
    while True:
        left = _TICK if limits.seconds is None else started + limits.seconds - time.monotonic()
        try:
            process.wait(max(0.0, min(_TICK, left)))
            return None
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if stop.is_set():
            return "killed", "the pool was closed", None
        if limits.seconds is not None and now - started >= limits.seconds:
            return "timeout", f"took longer than {limits.seconds:g} s", None
        if limits.memory_bytes is not None and (used := session.memory(limits.memory_bytes)) > limits.memory_bytes:
            reason = f"its processes had {used / 1e6:.0f} MB resident, more than {limits.memory_bytes / 1e6:.0f} MB"
            return "out of memory", reason, None
        if limits.poll is not None and now - polled >= _SECOND:
            limits.poll()
            polled = now


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills whatever is left of the process's session, and waits until it is gone."""
    if process.poll() is None:
        with suppress(PermissionError):  # macOS, where all of the group has ended but not been waited for
            os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None  # noqa: S101 - opened as a pipe
    process.stdin.close()
    process.wait()
    session, deadline = _Session(process.pid), time.monotonic() + _LAST
    while (members := session.find()) and time.monotonic() < deadline:
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.005)


def _result(scratch: Path, log: Path) -> Outcome:
    """What the function's processes left."""
    path = scratch / child.RESULT
    killed = {"code": -int(signal.SIGKILL)}
    answer: dict[str, Any] = pickle.loads(path.read_bytes()) if path.exists() else killed  # noqa: S301 - our own
    code: int | None = answer.get("code")
    if code == -signal.SIGKILL:
        return "killed", "killed by signal 9 from outside, as the kernel does when memory runs out", None
    if code is not None:
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit status {code}"
        return "failed", f"its process ended with {how}; last words: {_last_line(log)}", None
    if answer["status"] != "finished":
        return answer["status"], answer["reason"], None
    try:
        return "finished", "", cloudpickle.loads(answer["value"])
    except Exception as error:
        return "failed", f"what it returned cannot be read here: {type(error).__name__}: {error}", None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "none"


class _Session:
    """The processes of a session, by /proc; none where the system has no /proc."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.members: list[int] = []
        self.searched = float("-inf")

    def find(self) -> list[int]:
        """Processes that live."""
        found = []
        for entry in os.scandir(_PROC) if _PROC.is_dir() else ():
            if entry.name.isdecimal():
                fields = _stat(int(entry.name))
                if fields and int(fields[3]) == self.leader and fields[0] not in "ZX":
                    found.append(int(entry.name))
        return found

    def memory(self, enough: int) -> int:
        """Resident bytes; pages that several processes share count once where the sum is above `enough`."""
        now = time.monotonic()
        if now - self.searched >= _SECOND or len(self.members) < 2:
            self.members, self.searched = self.find(), now
        stats = (_stat(member) for member in self.members)
        plain = sum(int(fields[21]) for fields in stats if fields) * os.sysconf("SC_PAGE_SIZE")
        return plain if plain <= enough else sum(map(_proportional, self.members))


def _stat(process: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third, the state, on; None if the process is gone."""
    try:
        return (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _proportional(process: int) -> int:
    """Resident bytes, shared pages divided by those who share them."""
    try:
        lines = (_PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except OSError:
        fields = _stat(process)
        return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
