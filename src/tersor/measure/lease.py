"""One measurement at a time on a machine: whoever measures waits for the right to, and others stand still meanwhile.

A directory of the user holds three things::

    lock                      flock, exclusive while somebody measures; inside: the measurer's process group
    working/GROUP-START-…     a process group that may be paused, one file for each registration
    paused/GROUP-START-…      the same name while the group is paused

START is the time at which the group's leader started: a process that got the number later is never signalled. A file
in `paused` is there before the group stops and goes after it runs again, so that whatever a killed measurer has left
can be found: the system has freed its lock, and the next one to look (`Lease.heal`) continues what it had stopped.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tersor.core.files import disk_errors
from tersor.errors import ConfigError, MeasurementError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("tersor")

VARIABLE = "TERSOR_LEASE"
POLL_SECONDS = 0.02
SETTLE_SECONDS = 1.0  # that a group may take to stand still; a process inside a system call stops when it returns
STILL = {"T", "t", "Z", "X"}


class Lease:
    """The right to measure on this machine, and the register of those who may be paused for it.

    ::

        lease = Lease()
        with lease.working(child.pid):  # by whoever started `child` with start_new_session=True
            child.wait()
        with lease.measuring():  # elsewhere, at the same time
            times = latency(contestants, inputs, threads=2)

    Where the system has no `fcntl`, only threads of one process wait for each other; where it has no `/proc`, nobody is
    paused. Both are logged.

    Args:
        directory: Where the lease is kept, the same for all who shall respect it. By default what the environment
            variable `TERSOR_LEASE` says, else a directory of this user among the temporary files.

    Raises:
        ConfigError: if the directory is not this user's own, or others may write to it: they could have processes of
            this user stopped.
        OutputDirectoryError: if it cannot be made.
    """

    def __init__(self, directory: Path | None = None) -> None:
        wanted = (_default() if directory is None else Path(directory)).absolute()
        self.directory = wanted.parent.resolve() / wanted.name  # one name for one place, but a link stays a link
        self._working, self._paused = self.directory / "working", self.directory / "paused"
        if fcntl is not None:
            self._prepare()

    @contextmanager
    def working(self, group: int | None = None) -> Iterator[None]:
        """Registers a process group that may be paused while somebody measures.

        If somebody measures right now, a group of others is paused at once; one's own group waits here instead.

        Args:
            group: Its number, the process id of its leader; by default one's own. A shell takes a paused foreground
                job's terminal away: register groups of child processes, started with `start_new_session=True`.

        Raises:
            ConfigError: if there is a process of that number, but no group.
        """
        number = os.getpgrp() if group is None and fcntl is not None else group
        if number is None or not _can_pause():
            yield
            return
        self.heal()
        entry = _entry(number)
        if entry is None:  # its leader has ended already
            yield
            return
        file, process = self._working / entry, os.getpid()
        try:
            file.touch()
            self._begin_work(entry, number)
            yield
        finally:
            if os.getpid() == process:  # not in a fork that leaves the block
                file.unlink(missing_ok=True)

    @contextmanager
    def measuring(self, *, timeout_seconds: float | None = None) -> Iterator[None]:
        """Waits for the exclusive right to measure; all registered groups but the caller's own stand still inside.

        They are continued at the end, whatever happens. Inside another `measuring` of the same thread this does
        nothing; another thread waits like another process, and so does a child process, for its parent.

        Args:
            timeout_seconds: How long to wait; 0 asks once, None waits without end.

        Raises:
            MeasurementError: if others measured all the time.
        """
        limit = math.inf if timeout_seconds is None else timeout_seconds
        if not limit >= 0:
            raise ConfigError(f"timeout_seconds: expected a number from 0, or None, got {timeout_seconds!r}")
        deadline, turn = time.monotonic() + limit, _TURNS.setdefault(self.directory, _Turn())
        if not turn.threads.acquire(timeout=min(limit, threading.TIMEOUT_MAX)):
            raise self._timeout(limit)
        try:
            if fcntl is None:
                logger.warning("this system has no fcntl: other processes may disturb the measurement")
            with nullcontext() if turn.handle is not None or fcntl is None else self._alone(turn, deadline, limit):
                yield
        finally:
            turn.threads.release()

    def heal(self) -> int:
        """Continues the groups that a measurer which died had paused, and returns how many; 0 while one measures.

        Supervisors call it every second; it costs a look into a directory.
        """
        if not _can_pause():
            return 0
        self._prepare()  # temporary directories are cleaned
        if not any(self._paused.iterdir()):
            return 0
        handle = self._try(fcntl.LOCK_SH)
        if handle is None:
            return 0
        try:
            return self._resume()
        finally:
            os.close(handle)

    def _prepare(self) -> None:
        with disk_errors(self.directory), suppress(FileExistsError):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ConfigError(
                f"lease: expected a directory that belongs to user {os.getuid()} and that no one else may write, but "
                f"{self.directory} is {stat.filemode(found.st_mode)} of user {found.st_uid}; remove it, or name "
                f"another in the environment variable {VARIABLE}"
            )
        with disk_errors(self.directory):
            for part in (self._working, self._paused):
                part.mkdir(mode=0o700, exist_ok=True)

    def _begin_work(self, entry: str, number: int) -> None:
        """The registration is there: whoever measures from now on sees it, only the present measurer may not."""
        if number == os.getpgrp():
            while not self._nobody_measures() and self._measurer() != number:
                time.sleep(POLL_SECONDS)
        elif not self._nobody_measures():
            self._pause(entry)
            # A measurer that ended meanwhile may have continued the group before it was stopped.
            (self._paused / entry).touch()
            self.heal()

    @contextmanager
    def _alone(self, turn: _Turn, deadline: float, limit: float) -> Iterator[None]:
        self._prepare()
        while (handle := self._try(fcntl.LOCK_EX)) is None:
            if time.monotonic() >= deadline:
                raise self._timeout(limit)
            time.sleep(POLL_SECONDS)
            self.heal()  # what a dead supervisor has paused may be in the way
        turn.handle = handle
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpgrp()).encode(), 0)
            self._resume()  # what a dead measurer left, registered or not
            if _can_pause():
                self._pause_all()
            else:
                logger.warning("this system has no /proc: parallel work is not paused while measuring")
            yield
        finally:
            if _TURNS.get(self.directory) is turn:  # not in a fork that leaves the block: the lock is its parent's
                try:
                    self._resume()
                finally:
                    turn.handle = None
                    os.close(handle)
                self.heal()  # who came between the two

    def _pause_all(self) -> None:
        groups = []
        for file in self._working.iterdir():
            number, alive = _group_of(file.name)
            if not alive:
                file.unlink(missing_ok=True)
            elif number != os.getpgrp():
                self._pause(file.name)
                groups.append(number)
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(_stands(group) is False for group in groups) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)

    def _pause(self, entry: str) -> None:
        (self._paused / entry).touch()
        _signal(entry, signal.SIGSTOP)

    def _resume(self) -> int:
        continued = set()
        for file in list(self._paused.iterdir()):
            if _signal(file.name, signal.SIGCONT):
                continued.add(_group_of(file.name)[0])
            file.unlink(missing_ok=True)
        return len(continued)

    def _nobody_measures(self) -> bool:
        handle = self._try(fcntl.LOCK_SH)
        if handle is None:
            return False
        os.close(handle)
        return True

    def _try(self, kind: int) -> int | None:
        """An open, locked file, to be closed; None if the lock is taken."""
        handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _measurer(self) -> int | None:
        text = (self.directory / "lock").read_text()
        return int(text) if text.isdecimal() else None

    def _timeout(self, seconds: float) -> MeasurementError:
        return MeasurementError(
            f"others have measured for {seconds:g} s without a pause (lease in {self.directory}); wait for them, or "
            "allow more time"
        )


@dataclass
class _Turn:
    """The lease as the threads of this process share it."""

    threads: threading.RLock = field(default_factory=threading.RLock)
    handle: int | None = None


_TURNS: dict[Path, _Turn] = {}


def _forget() -> None:
    """A forked process measures nothing, and must not keep the lock when its parent has gone."""
    for turn in _TURNS.values():
        if turn.handle is not None:
            os.close(turn.handle)
    _TURNS.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


def _default() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(tempfile.gettempdir()) / (f"tersor-lease-{os.getuid()}" if fcntl is not None else "tersor-lease")


def _can_pause() -> bool:
    return fcntl is not None and Path("/proc/self/stat").exists()


def _entry(group: int) -> str | None:
    """A new file name for a registration; None if the group's leader is gone."""
    with suppress(ProcessLookupError):
        if group <= 1 or os.getpgid(group) != group:
            raise ConfigError(
                f"group: expected the number of a process group, got {group!r}; start the process with "
                "start_new_session=True"
            )
        _, started = _process(group)
        return f"{group}-{started}-{_boot()}-{secrets.token_hex(4)}"
    return None


def _group_of(entry: str) -> tuple[int, bool]:
    """The group that a file is about, and whether its leader is still the process that was registered."""
    try:
        group, started, boot, _ = entry.split("-")
        number = int(group)
        return number, number > 1 and boot == _boot() and _process(number)[1] == started
    except (ValueError, ProcessLookupError):
        return 0, False


def _process(number: int) -> tuple[str, str]:
    """State and start time of a process, in clock ticks since the machine started (proc_pid_stat(5), fields 3, 22).

    Raises:
        ProcessLookupError: if there is none.
    """
    try:
        text = Path(f"/proc/{number}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {number}") from None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _stands(group: int) -> bool | None:
    try:
        return _process(group)[0] in STILL
    except ProcessLookupError:
        return None


def _signal(entry: str, number: signal.Signals) -> bool:
    """Signals a whole group, if it is still the one that was registered."""
    group, alive = _group_of(entry)
    if not alive:
        return False
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
