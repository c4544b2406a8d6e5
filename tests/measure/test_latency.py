"""Latency: each contestant in a process of its own, and plain words when one of them fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.report import Latency
from tersor.errors import MeasurementError
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.measure.latency import Measured, summarise

BATCH = Batch((torch.zeros(2, 3),), {}, None)
QUICK = Protocol(rounds=2, round_seconds=0.05, min_calls=3, warmup_calls=2, timeout_seconds=60)

Call = Callable[..., Any]


def measured(
    *, protocol: Protocol = QUICK, batch: Batch = BATCH, **factories: Callable[[], Call]
) -> dict[str, Measured]:
    contestants = {name: Contestant(factory) for name, factory in factories.items()}
    return latency(contestants, batch, threads=1, protocol=protocol)


def children() -> set[int]:
    """Processes that this one started."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(number) for number in listed.read_text().split()} if listed.exists() else set()


def by_value(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a factory travel by value: the measuring process need not import this file, and starts sooner."""
    factory.__module__ = "__main__"
    return factory


def sleeper(milliseconds: float) -> Callable[[], Call]:
    def factory() -> Call:
        import time

        def call(*args: Any, **kwargs: Any) -> None:
            time.sleep(milliseconds / 1e3)

        return call

    return by_value(factory)


# --- numbers


def test_known_contestants_come_out_in_proportion() -> None:
    progress: list[tuple[int, int]] = []
    before = children()
    contestants = {"slow": Contestant(sleeper(6)), "fast": sleeper(2)}  # a factory alone will do
    found = latency(
        contestants, BATCH, threads=1, protocol=QUICK, progress=lambda done, total: progress.append((done, total))
    )
    assert list(found) == ["slow", "fast"]
    slow, fast = found["slow"].latency, found["fast"].latency
    assert 6 <= slow.best <= slow.median < 12
    assert 2 <= fast.best <= fast.median < 5
    assert 1.8 < paired_ratio(slow, fast) < 4
    assert progress == [(1, 2), (2, 2)]
    assert len(slow.rounds) == len(fast.rounds) == 2
    assert slow.n >= 2 * QUICK.min_calls
    assert fast.n > slow.n  # the faster one is called more often in the same time
    assert children() == before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the memory of a process")
def test_memory_of_the_model_counts_and_that_of_its_imports_does_not() -> None:
    def hungry() -> Call:
        import numpy as np

        block = np.ones(30_000_000)  # 240 MB

        def call(*args: Any) -> float:
            return float(block[0])

        return call

    found = measured(hungry=by_value(hungry), modest=sleeper(0.1))
    large, small = found["hungry"].peak_memory_bytes, found["modest"].peak_memory_bytes
    assert large is not None
    assert small is not None
    assert small < 100e6
    assert 200e6 < large < 400e6


@pytest.mark.slow
def test_inputs_arrive_as_arrays_by_position_and_by_name() -> None:
    def checking() -> Call:
        import os

        import numpy as np

        def call(first: Any, *, mask: Any) -> None:
            assert isinstance(first, np.ndarray)
            assert first.tolist() == [[0.0, 1.0]]
            assert mask.dtype == np.int64
            assert os.environ["OMP_NUM_THREADS"] == "1"

        return call

    batch = Batch((torch.tensor([[0.0, 1.0]]),), {"mask": torch.tensor([1])}, None)
    assert measured(checking=by_value(checking), batch=batch)["checking"].latency.n >= 6


def test_a_summary_has_every_number_in_milliseconds() -> None:
    summary = summarise([[0.001, 0.002, 0.003], [0.004, 0.005, 0.100]])
    assert summary.median == pytest.approx(3.5)
    assert summary.best == pytest.approx(1)
    assert summary.n == 6
    assert summary.rounds == pytest.approx([2, 5])
    assert summary.iqr == pytest.approx(float(np.subtract(*np.quantile([1, 2, 3, 4, 5, 100], [0.75, 0.25]))))
    assert summary.p95 == pytest.approx(float(np.quantile([1, 2, 3, 4, 5, 100], 0.95)))
    assert len(summary.histogram) == 201
    assert summary.histogram[0] == pytest.approx(1)
    assert summary.histogram[-1] == pytest.approx(100)
    assert summary.histogram == sorted(summary.histogram)
    assert summary.noisy
    assert not summarise([[0.001] * 10]).noisy


def test_the_ratio_is_taken_within_rounds() -> None:
    def rounds(*values: float) -> Latency:
        return summarise([[value / 1e3] * 3 for value in values])

    # the machine is ten times slower in the second round: the ratio does not notice
    assert paired_ratio(rounds(2, 20, 2), rounds(1, 10, 1)) == pytest.approx(2)
    assert paired_ratio(rounds(1, 10, 1), rounds(2, 20, 2)) == pytest.approx(0.5)


# --- failures


def test_a_contestant_that_cannot_be_loaded_is_named_with_its_last_words() -> None:
    def broken() -> Call:
        raise ValueError("no such weights: layer7")

    before = children()
    with pytest.raises(MeasurementError, match=r"'broken' ended: ValueError: no such weights: layer7") as caught:
        measured(broken=by_value(broken))
    assert "exit status 1" in str(caught.value)
    assert children() == before


@pytest.mark.slow
def test_a_contestant_that_fails_later_ends_all_processes() -> None:
    def tiring() -> Call:
        calls = []

        def call(*args: Any) -> None:
            calls.append(1)
            if len(calls) > 4:
                raise RuntimeError("tired after four calls")

        return call

    before = children()
    with pytest.raises(MeasurementError, match=r"'tiring' ended: RuntimeError: tired after four calls"):
        measured(fine=sleeper(0.1), tiring=by_value(tiring))
    assert children() == before


@pytest.mark.slow
def test_last_words_that_are_no_text_are_still_told() -> None:
    def babbling() -> Call:
        import os

        os.write(2, b"\xff\xfe\n")
        raise ValueError("after noise")

    with pytest.raises(MeasurementError, match="after noise"):
        measured(babbling=by_value(babbling))


def test_a_contestant_that_hangs_is_killed() -> None:
    started, before = time.monotonic(), children()
    with pytest.raises(MeasurementError, match=r"'hanging' ended: killed \(no answer within 5 s"):
        measured(hanging=sleeper(3_600_000), protocol=QUICK.model_copy(update={"timeout_seconds": 5.0}))
    assert time.monotonic() - started < 30
    assert children() == before


@pytest.mark.slow
def test_a_contestant_that_is_killed_from_outside_is_told() -> None:
    def suicidal() -> Call:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        return print

    with pytest.raises(MeasurementError, match=r"'suicidal' ended: killed .*out of memory"):
        measured(suicidal=by_value(suicidal))


def test_what_cannot_be_pickled_is_refused_before_a_process_starts() -> None:
    lock = threading.Lock()
    before = children()
    with pytest.raises(MeasurementError, match=r"'locked' cannot be sent .*remove hooks, open files and locks"):
        measured(locked=lambda: lock)
    assert children() == before


@pytest.mark.slow
def test_an_interrupt_leaves_no_process_behind() -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = children()
    with pytest.raises(KeyboardInterrupt):
        latency({"one": Contestant(sleeper(0.1))}, BATCH, threads=1, protocol=QUICK, progress=interrupt)
    assert children() == before


# --- what models do


def test_models_that_print_and_read_do_not_break_the_protocol(capfd: pytest.CaptureFixture[str]) -> None:
    def chatty() -> Call:
        import os
        import sys

        print("loading")
        os.write(1, b"0.5 0.5 0.5\n")  # would pass for an answer

        def call(*args: Any) -> None:
            print("ready")
            os.write(1, b"1 1 1\n")
            print("and this", file=sys.stderr)
            assert sys.stdin.readline() == ""  # would eat a question

        return call

    found = measured(chatty=by_value(chatty))["chatty"].latency
    assert found.median < 100
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_module_of_this_file_can_be_measured() -> None:
    found = latency({"module": Doubling}, torch.ones(2, 3), threads=1, protocol=QUICK)
    assert found["module"].latency.n >= 6


class Doubling(nn.Module):
    """Lives in a test file, which the measuring process can import; modules are called as PyTorch calls them."""

    def forward(self, x: Any) -> Tensor:
        assert isinstance(x, Tensor)
        assert x.tolist() == [[1.0] * 3] * 2
        assert torch.is_inference_mode_enabled()
        return 2 * x


SCRIPT = """
import sys
import torch
from functools import partial
from torch import nn
from tersor.core.batch import Batch
from tersor.measure import Contestant, Protocol, latency


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


def as_it_is(module):
    return module


print("this line would run again in a measuring process that imported the script", file=sys.stderr)
found = latency({"mine": Contestant(partial(as_it_is, Mine()))}, Batch((torch.zeros(2, 3),), {}, None), threads=1,
                protocol=Protocol(rounds=1, round_seconds=0.01, warmup_calls=1))
print(found["mine"].latency.n)
"""


def test_a_model_that_a_script_defines_can_be_measured_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    assert done.stderr.count("this line") == 1


@pytest.mark.slow
def test_the_measuring_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace("rounds=1, round_seconds=0.01", "rounds=100000, round_seconds=0.01").replace(
            "threads=1,", "threads=1, progress=lambda done, total: print('going', flush=True),"
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:  # noqa: S603
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"going\n"
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        if not listed.exists():
            parent.kill()
            pytest.skip("this system does not tell the children of a process")
        (worker,) = [int(number) for number in listed.read_text().split()]
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
