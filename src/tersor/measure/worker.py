"""The measuring process: loads one contestant, then answers `run N` and `memory` on standard input.

Started by `tersor.measure.latency` only; its payload is written by the parent and read once.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import TextIO


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes, -1 where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return -1
    for line in status.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return -1


def reset_peak() -> None:
    """Makes the kernel count peak memory from now on, where it can."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def serve(payload_path: Path, questions: TextIO, answers: TextIO) -> None:
    """Loads the payload and answers until the questions end."""
    import cloudpickle
    import torch

    payload = cloudpickle.loads(payload_path.read_bytes())
    for name in payload["preload"]:
        importlib.import_module(name)
    torch.set_num_threads(payload["threads"])
    idle = resident("VmRSS")
    reset_peak()
    call = cloudpickle.loads(payload["factory"])()
    args, kwargs = payload["args"], payload["kwargs"]
    if isinstance(call, torch.nn.Module):
        args = tuple(torch.from_numpy(value) for value in args)
        kwargs = {name: torch.from_numpy(value) for name, value in kwargs.items()}
        call = torch.inference_mode()(call.__call__)
    for question in questions:
        word, _, number = question.strip().partition(" ")
        if word == "run":
            times = []
            for _ in range(int(number)):
                started = time.perf_counter()
                call(*args, **kwargs)
                times.append(time.perf_counter() - started)
            answer = " ".join(f"{value:.9f}" for value in times)
        elif word == "memory":
            peak = resident("VmHWM")
            answer = str(max(peak - idle, 0) if peak >= 0 and idle >= 0 else -1)
        else:
            answer = "ready"
        answers.write(answer + "\n")
        answers.flush()


def main() -> None:
    """Keeps the pipes for questions and answers: a model reads nothing, and what it prints goes to standard error."""
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), questions, answers)


if __name__ == "__main__":
    main()
