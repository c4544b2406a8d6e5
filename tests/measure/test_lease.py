"""The measuring lease: real processes stand still, go on, and take turns."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import pytest

from tersor.errors import ConfigError, MeasurementError
from tersor.measure import lease as module
from tersor.measure.lease import Lease

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to pause processes")

COUNT = """
import sys, time
number = 0
with open(sys.argv[1], "r+b", buffering=0) as file:
    while True:
        number += 1
        file.seek(0)
        file.write(b"%12d" % number)
        time.sleep(0.001)
"""
# Without PyTorch: the file and what it imports, so that a process is there in a moment.
LOAD = """
import sys, time, types
from pathlib import Path
for name in ("tersor", "tersor.core", "tersor.measure"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(Path(sys.argv[1], *name.split(".")[1:]))]
from tersor.measure.lease import Lease
lease = Lease(Path(sys.argv[2]))
"""
MEASURE = LOAD + "with lease.measuring():\n    print('measuring', flush=True)\n    time.sleep(float(sys.argv[3]))\n"
WORK = LOAD + "with lease.working():\n    print('working', flush=True)\n    time.sleep(60)\n"
TURNS = LOAD + (
    "import os\nlog = open(sys.argv[3], 'a', buffering=1)\nfor _ in range(5):\n    with lease.measuring():\n"
    "        print('in', os.getpid(), file=log)\n        time.sleep(.02)\n        print('out', os.getpid(), file=log)\n"
    "    time.sleep(0.01)\n"
)
OWN = LOAD + "with lease.working(), lease.measuring():\n    print('measuring')\n"
FORK = LOAD + (
    "import os\nwith lease.measuring():\n    if os.fork() == 0:\n        time.sleep(60)\n"
    "    print('measuring', flush=True)\n    time.sleep(60)\n"
)
SOURCE = Path(module.__file__).parents[1]


class Counter:
    """A process, leader of its own group, that counts as fast as it can."""

    def __init__(self, file: Path, *, session: bool = True) -> None:
        self.file = file
        file.write_bytes(b"%12d" % 0)
        command = [sys.executable, "-S", "-c", COUNT, str(file)]
        self.process = subprocess.Popen(command, start_new_session=session)  # noqa: S603 - our script
        self.wait_for_progress()

    @property
    def group(self) -> int:
        return self.process.pid

    def read(self) -> int:
        return int(self.file.read_bytes())

    def moves(self, seconds: float = 0.15) -> bool:
        before = self.read()
        time.sleep(seconds)
        return self.read() > before

    def wait_for_progress(self) -> None:
        before = self.read()
        wait_until(lambda: self.read() > before)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_until(met: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return Lease(tmp_path / "lease")


@pytest.fixture
def counter(tmp_path: Path, stack: ExitStack) -> Counter:
    counter = Counter(tmp_path / "count")
    stack.callback(counter.end)
    return counter


@pytest.fixture
def start(lease: Lease, stack: ExitStack) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that uses the lease, and waits until it says so."""

    def run(script: str, *arguments: object, says: bool = True) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(SOURCE), str(lease.directory), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
        assert process.stdout is not None
        stack.callback(process.stdout.close)
        stack.callback(process.wait)
        stack.callback(kill_group, process.pid)
        if says:
            assert process.stdout.readline()
        return process

    return run


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def files(lease: Lease) -> list[str]:
    return sorted(path.name for path in lease.directory.rglob("*") if path.is_file() and path.name != "lock")


# --- pausing


def test_others_stand_still_while_somebody_measures(lease: Lease, counter: Counter) -> None:
    with lease.working(counter.group):
        assert counter.moves()
        with lease.measuring():
            assert not counter.moves()
        counter.wait_for_progress()
        assert len(files(lease)) == 1
    assert files(lease) == []
    with lease.measuring():
        assert counter.moves()  # no longer registered


def test_others_go_on_after_an_error(lease: Lease, counter: Counter) -> None:
    def fail() -> None:
        with lease.measuring():
            assert not counter.moves()
            raise ZeroDivisionError

    with lease.working(counter.group):
        with pytest.raises(ZeroDivisionError):
            fail()
        counter.wait_for_progress()
        with lease.measuring(timeout_seconds=5):  # and the right is free
            assert not counter.moves()


def test_a_group_is_registered_as_often_as_it_is(lease: Lease, counter: Counter) -> None:
    with lease.working(counter.group):
        with lease.working(counter.group):
            pass
        with lease.measuring():
            assert not counter.moves()
    counter.wait_for_progress()


def test_ones_own_group_goes_on(lease: Lease, counter: Counter, start: Callable[..., subprocess.Popen[str]]) -> None:
    with lease.working(counter.group):
        process = start(OWN, says=False)
        assert process.wait(timeout=30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "measuring\n"
    counter.wait_for_progress()


def test_who_comes_while_one_measures_is_paused_at_once(lease: Lease, counter: Counter) -> None:
    with lease.measuring(), lease.working(counter.group):
        wait_until(lambda: not counter.moves(0.05))
        assert not counter.moves()
        assert lease.heal() == 0  # somebody measures
        assert not counter.moves()
    counter.wait_for_progress()
    assert files(lease) == []


def test_a_group_that_registers_itself_waits_until_nobody_measures(
    lease: Lease, start: Callable[..., subprocess.Popen[str]]
) -> None:
    with lease.measuring():
        process = start(WORK, says=False)
        wait_until(lambda: files(lease))
        time.sleep(0.2)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        assert not process.stdout.readline()
    os.set_blocking(process.stdout.fileno(), True)
    assert process.stdout.readline() == "working\n"


# --- turns


def test_measurers_take_turns(lease: Lease, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(TURNS, log, says=False) for _ in range(2)]
    assert [process.wait(timeout=30) for process in processes] == [0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 20
    assert all(lines[at].split() == ["in", lines[at + 1].split()[1]] for at in range(0, 20, 2))
    assert all(lines[at].startswith("out") for at in range(1, 20, 2))
    assert len({line.split()[1] for line in lines}) == 2


def test_waiting_ends_in_time(lease: Lease, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(MEASURE, 60)
    started = time.monotonic()
    with pytest.raises(MeasurementError, match=r"0\.2 s.*allow more time"), lease.measuring(timeout_seconds=0.2):
        pytest.fail("measured beside another")
    assert 0.2 <= time.monotonic() - started < 5
    assert process.poll() is None
    with pytest.raises(ConfigError, match="timeout_seconds"), lease.measuring(timeout_seconds=-1):
        pytest.fail("measured")


def test_inside_itself_it_does_nothing_and_threads_take_turns(lease: Lease, counter: Counter) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with Lease(lease.directory).measuring(timeout_seconds=0.1):
                found.append("measured")
        except MeasurementError:
            found.append("waited in vain")

    with lease.working(counter.group), lease.measuring():
        with Lease(lease.directory).measuring(timeout_seconds=0):
            assert not counter.moves(0.05)
        assert not counter.moves()  # the inner end is not the end
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert found == ["waited in vain", "measured"]


# --- what the dead leave


def test_a_killed_measurer_is_healed(
    lease: Lease, counter: Counter, start: Callable[..., subprocess.Popen[str]]
) -> None:
    with lease.working(counter.group):
        process = start(MEASURE, 60)
        assert not counter.moves()
        process.kill()
        process.wait()
        assert not counter.moves()
        assert lease.heal() == 1
        counter.wait_for_progress()
        assert lease.heal() == 0


def test_measuring_and_working_heal(
    lease: Lease, counter: Counter, start: Callable[..., subprocess.Popen[str]]
) -> None:
    for how in (lease.measuring, lease.working):
        with lease.working(counter.group):
            process = start(MEASURE, 60)
            process.kill()
            process.wait()
        assert not counter.moves()
        with how():
            counter.wait_for_progress()  # it is no longer registered
        assert files(lease) == []


def test_whom_the_user_stopped_stays_so(lease: Lease, counter: Counter) -> None:
    with lease.working(counter.group):
        os.killpg(counter.group, signal.SIGSTOP)
        wait_until(lambda: not counter.moves(0.05))
        assert lease.heal() == 0
        assert not counter.moves()


def test_a_forked_child_does_not_keep_the_right(lease: Lease, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(FORK)
    process.kill()
    process.wait()
    os.killpg(process.pid, 0)  # the child is still there
    with lease.measuring(timeout_seconds=5):
        pass


def test_registrations_of_the_dead_are_removed(lease: Lease, tmp_path: Path, counter: Counter) -> None:
    gone = Counter(tmp_path / "gone")
    with lease.working(gone.group):
        gone.end()
        assert len(files(lease)) == 1
        with lease.measuring():
            assert files(lease) == []
    with lease.working(gone.group):  # nothing to pause: no error
        assert files(lease) == []


@pytest.mark.parametrize("part", [1, 2])
def test_who_got_the_number_later_is_never_signalled(lease: Lease, counter: Counter, part: int) -> None:
    with lease.working(counter.group):
        (name,) = files(lease)
    parts = name.split("-")
    assert parts[0] == str(counter.group)
    parts[part] = "7" if part == 1 else "0" * 8  # of another process, of another start of the machine
    for entry in ("-".join(parts), "nonsense", "0-0-0-0"):
        (lease.directory / "working" / entry).touch()
    with lease.measuring():
        assert counter.moves()
    os.killpg(counter.group, signal.SIGSTOP)
    (lease.directory / "paused" / "-".join(parts)).touch()
    assert lease.heal() == 0
    assert not counter.moves()
    assert files(lease) == []


# --- settings


def test_only_a_group_can_be_registered(lease: Lease, tmp_path: Path, stack: ExitStack) -> None:
    friend = Counter(tmp_path / "friend", session=False)
    stack.callback(friend.end)
    for number in (friend.group, 0, 1):
        with pytest.raises(ConfigError, match="start_new_session"), lease.working(number):
            pytest.fail("registered")
    assert files(lease) == []


def test_the_directory_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TERSOR_LEASE", raising=False)
    default = Lease().directory
    assert default == tmp_path / f"tersor-lease-{os.getuid()}"
    assert default.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TERSOR_LEASE", str(tmp_path / "deep" / "named"))
    assert Lease().directory == tmp_path / "deep" / "named"
    assert Lease(tmp_path / "given").directory == tmp_path / "given"
    default.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "given")
    (tmp_path / "file").touch()
    for place in (default, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(ConfigError, match="TERSOR_LEASE"):
            Lease(place)


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to give files away")
def test_the_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir(mode=0o700)
    os.chown(tmp_path / "foreign", 12345, -1)
    with pytest.raises(ConfigError, match="of user 12345"):
        Lease(tmp_path / "foreign")


def without_fcntl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a system without `fcntl` loads it."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        spec = importlib.util.spec_from_file_location("lease_without_fcntl", module.__file__)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "lease_without_fcntl", loaded)
        spec.loader.exec_module(loaded)
    return loaded


def test_without_fcntl_nobody_is_paused_and_it_is_said(
    tmp_path: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = without_fcntl(monkeypatch).Lease(tmp_path / "lease")
    with caplog.at_level(logging.WARNING, "tersor"), lease.working(counter.group), lease.working(), lease.measuring():
        assert counter.moves()
    assert lease.heal() == 0
    assert "no fcntl" in caplog.text
    assert not (tmp_path / "lease").exists()
