"""Latency: every candidate in a process of its own, interleaved with the others round by round.

Threads of one runtime would disturb another in the same process, and a machine that slows down for a minute
would punish whoever is measured in that minute; ratios are therefore taken within rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import cloudpickle
import numpy as np
from pydantic import Field
from torch import Tensor

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.core.report import Latency
from tersor.errors import MeasurementError

Factory = Callable[[], Callable[..., Any]]


class Protocol(Config):
    """How latency is measured.

    `rounds` interleaved rounds; in each every candidate runs for about `round_seconds`, at least `min_calls`
    calls, after `warmup_calls` calls that do not count. A process that does not answer for `timeout_seconds` is
    killed.
    """

    rounds: int = Field(default=12, ge=1)
    round_seconds: float = Field(default=0.3, gt=0)
    min_calls: int = Field(default=5, ge=1)
    warmup_calls: int = Field(default=10, ge=1)
    timeout_seconds: float = Field(default=300.0, gt=0)


class Measured(NamedTuple):
    """Times of one candidate and its peak memory in bytes (None where the system does not tell)."""

    latency: Latency
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Contestant:
    """One candidate: how to load it, and the modules whose import shall not count as its memory."""

    factory: Factory
    preload: tuple[str, ...] = ()


def latency(
    contestants: Mapping[str, Contestant | Factory],
    inputs: Batch | Tensor | tuple[Tensor, ...],
    *,
    threads: int,
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:
    """Measures the wall time of one call on `inputs` for every contestant.

    ::

        times = latency({"small": lambda: small.eval(), "large": lambda: large.eval()}, images, threads=2)
        print(paired_ratio(times["large"].latency, times["small"].latency))

    Args:
        contestants: By name; each factory is sent to a fresh process and called there once; what it returns is
            called with NumPy arrays if it is a session, with tensors if it is a module.
        inputs: The inputs of every call.
        threads: Threads that each process may use.
        protocol: How long and how often.
        progress: `(rounds done, rounds in all)`.

    Raises:
        MeasurementError: if a process fails, with the last line of what it said.
    """
    plan = protocol or Protocol()
    batch = _as_inputs(inputs)
    times: dict[str, list[list[float]]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(_Worker(name, _as_contestant(contestant), batch, threads, plan))
            for name, contestant in contestants.items()
        }
        calls = {}
        for name, worker in workers.items():
            single = float(np.median(worker.run(plan.warmup_calls)))
            calls[name] = max(plan.min_calls, min(2000, int(plan.round_seconds / max(single, 1e-6))))
        for done in range(plan.rounds):
            for name, worker in workers.items():
                times[name].append(worker.run(calls[name]))
            if progress is not None:
                progress(done + 1, plan.rounds)
        peaks = {name: worker.peak_memory() for name, worker in workers.items()}
    return {name: Measured(summarise(rounds), peaks[name]) for name, rounds in times.items()}


def summarise(rounds: Sequence[Sequence[float]]) -> Latency:
    """Turns the call times of all rounds, in seconds, into a `Latency` in milliseconds."""
    times = np.concatenate([np.asarray(calls) for calls in rounds]) * 1e3
    low, median, high, p95 = np.quantile(times, [0.25, 0.5, 0.75, 0.95])
    return Latency(
        median=float(median),
        p95=float(p95),
        iqr=float(high - low),
        n=len(times),
        best=float(times.min()),
        rounds=[float(np.median(calls)) * 1e3 for calls in rounds],
        histogram=[float(value) for value in np.quantile(times, np.linspace(0, 1, 201))],
    )


def paired_ratio(baseline: Latency, candidate: Latency) -> float:
    """Median over rounds of baseline time / candidate time: above 1 means that the candidate is faster."""
    return float(np.median(np.array(baseline.rounds) / np.array(candidate.rounds)))


def _as_contestant(value: Contestant | Factory) -> Contestant:
    return value if isinstance(value, Contestant) else Contestant(value)


def _as_inputs(value: Batch | Tensor | tuple[Tensor, ...]) -> Batch:
    if isinstance(value, Batch):
        return value
    return Batch(value if isinstance(value, tuple) else (value,), {}, None)


class _Worker:
    """A child process that loads one contestant and times calls on request."""

    def __init__(self, name: str, contestant: Contestant, batch: Batch, threads: int, protocol: Protocol) -> None:
        self.name = name
        self.timeout = protocol.timeout_seconds
        self.contestant = contestant
        self.payload = {
            "preload": ("tersor.runtimes", *contestant.preload),
            "args": tuple(value.numpy() for value in batch.args),
            "kwargs": {key: value.numpy() for key, value in batch.kwargs.items()},
            "threads": threads,
        }
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        scratch = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.errors = self.stack.enter_context((scratch / "stderr").open("w+", errors="replace"))
        path = scratch / "payload"
        try:
            # Pickled twice, so that the child can look at its memory before the model exists.
            factory = cloudpickle.dumps(self.contestant.factory)
            path.write_bytes(cloudpickle.dumps({**self.payload, "factory": factory}))
        except Exception as error:
            self.stack.close()
            raise MeasurementError(
                f"{self.name!r} cannot be sent to a measuring process ({error}); latency needs a model that can be "
                "pickled: remove hooks, open files and locks from it"
            ) from error
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            [sys.executable, "-m", "tersor.measure.worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
                "OMP_NUM_THREADS": str(self.payload["threads"]),
            },
        )
        self.stack.callback(self._stop)
        try:
            self._ask("ready?")
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def run(self, calls: int) -> list[float]:
        """Seconds of each of `calls` calls."""
        return [float(value) for value in self._ask(f"run {calls}").split()]

    def peak_memory(self) -> int | None:
        """Bytes above the idle process."""
        answer = int(self._ask("memory"))
        return answer if answer >= 0 else None

    def _ask(self, question: str) -> str:
        assert self.process.stdin is not None  # noqa: S101 - opened as a pipe
        assert self.process.stdout is not None  # noqa: S101 - likewise
        timer = threading.Timer(self.timeout, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            raise MeasurementError(f"the process that measured {self.name!r} ended: {self._last_words()}")
        return answer.strip()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        if code == -9:
            return f"killed (no answer within {self.timeout:.0f} s, or out of memory)"
        return f"{lines[-1] if lines else 'no message'} (exit status {code})"

    def _stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
