"""The processes of one supervised function: a guard, and the worker that it forks and that runs the function.

The guard only waits. It ends the whole process group when the worker is done, when the parent closes the pipe on
its standard input, and when the parent is gone; a worker that computes could not be relied on to notice.

Started by `tersor.search.supervise` only, by its path and not as a module: importing the package takes seconds, and
what needs it imports it.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import cloudpickle

PAYLOAD = "function"
RESULT = "result"
_PR_SET_PDEATHSIG = 1
_GLANCE = 1.0  # seconds after which the guard looks whether its parent is still there


def guard(scratch: Path, parent: int, threads: int) -> None:
    """Forks the worker, waits, and ends the group; never returns."""
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    own = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.closerange(min(awake, wake), max(awake, wake) + 1)
        _die_with(own)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        work(scratch, threads)
    try:
        while True:
            ready, _, _ = select.select([0, awake], [], [], _GLANCE)
            if os.getppid() != parent or (0 in ready and not os.read(0, 1)):
                os.kill(worker, signal.SIGKILL)
                shutil.rmtree(scratch, ignore_errors=True)
                return
            if awake in ready:
                os.read(awake, 512)
            ended, status = os.waitpid(worker, os.WNOHANG)
            if ended:
                break
        if not (scratch / RESULT).exists():
            _leave(scratch, {"code": os.waitstatus_to_exitcode(status)})
    finally:
        os.killpg(0, signal.SIGKILL)


def work(scratch: Path, threads: int) -> None:
    """Runs the function and leaves what became of it; never returns."""
    try:
        try:
            content = (scratch / PAYLOAD).read_bytes()
            (scratch / PAYLOAD).unlink()
            function = cloudpickle.loads(content)
            del content
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
            answer = {"status": "finished", "value": cloudpickle.dumps(function())}
        except BaseException as error:
            traceback.print_exc()
            answer = {"status": _status(error), "reason": _reason(error)}
        _leave(scratch, answer)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # threads that the function left behind do not keep the process


def _die_with(guard: int) -> None:
    """Asks Linux to kill this process when the guard dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)


def _leave(scratch: Path, answer: dict[str, Any]) -> None:
    """Writes the result whole or not at all."""
    part = scratch / f"{RESULT}.{os.getpid()}"
    part.write_bytes(pickle.dumps(answer))
    part.replace(scratch / RESULT)


def _status(error: BaseException) -> str:
    """By name: the package is not imported here unless the function did it."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if "tersor.errors.NonFiniteError" in kinds:
        return "not finite"
    if isinstance(error, MemoryError) or "torch.OutOfMemoryError" in kinds or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    return "failed"


def _reason(error: BaseException) -> str:
    said = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return said
    last = frames[-1]
    return f"{said} ({Path(last.filename).name}, line {last.lineno}: {last.line or last.name})"


if __name__ == "__main__":
    guard(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
