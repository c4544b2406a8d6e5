"""Measures every model of this kit on this machine and writes the numbers to results.json.

    python bench.py [--threads N] [--rounds 12] [--seconds 0.3] [--out results.json]

Needs Python 3.9 or later, NumPy and the runtimes that kit.json names; no network. Every model runs in a process of its
own, interleaved with the others round by round, on inputs of its signature: floats are normal from a fixed seed,
integers are 1, which is a legal token and an open mask.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

HERE = Path(__file__).resolve().parent
SCHEMA_VERSION = 1
WARMUP_CALLS = 10
MIN_CALLS, MAX_CALLS = 5, 2000  # in a round
TIMEOUT_SECONDS = 600.0  # for one answer of a measuring process
BLOCK = 1 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures, writes, prints."""
    options = _options(arguments)
    kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    members = {str(member["name"]): member for member in kit["artifacts"]}
    if options.serve is not None:
        serve(members[options.serve], options.threads)
        return
    out = Path(options.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise SystemExit(f"bench.py: --out: {out} is not a file in an existing folder")
    for name, member in members.items():
        check_files(name, member)
    rounds, versions, peaks = measure(members, options)
    results = {
        "schema_version": SCHEMA_VERSION,
        "kit": sha256(HERE / "kit.json"),
        "machine": machine(versions),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "artifacts": {
            name: {
                "runtime": member["runtime"],
                "threads": options.threads or member["threads"],
                "batch": member["batch"],
                "files": {file: entry["sha256"] for file, entry in member["files"].items()},
                "latency": summarise(rounds[name]),
                "peak_memory_bytes": peaks[name],
                "choice": member["choice"],
            }
            for name, member in members.items()
        },
    }
    scratch = out.with_name(out.name + ".part")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    scratch.replace(out)
    print(table(results, members))
    print(f"\nwritten: {out}")


def check_files(name: str, member: dict[str, Any]) -> None:
    """Refuses a model file that is not the one that was packed."""
    for file, entry in member["files"].items():
        path = HERE / member["folder"] / file
        if not path.is_file():
            raise SystemExit(f"bench.py: {name}: {path} is missing; copy the kit again")
        if sha256(path) != entry["sha256"]:
            raise SystemExit(
                f"bench.py: {name}: {path} is not the file that was packed: its SHA-256 differs; copy the kit again"
            )


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def measure(
    members: dict[str, dict[str, Any]], options: argparse.Namespace
) -> tuple[dict[str, list[list[float]]], dict[str, str], dict[str, int | None]]:
    """Seconds of every call by round, versions of the runtimes, and peak memory in bytes."""
    times: dict[str, list[list[float]]] = {name: [] for name in members}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, options.threads or member["threads"]))
            for name, member in members.items()
        }
        versions = {members[name]["runtime"]: worker.ask("version") for name, worker in workers.items()}
        calls = {}
        for name, worker in workers.items():
            single = float(np.median(worker.ask(f"run {WARMUP_CALLS}")))
            calls[name] = max(MIN_CALLS, min(MAX_CALLS, int(options.seconds / max(single, 1e-6))))
        for done in range(options.rounds):
            for name, worker in workers.items():
                times[name].append(worker.ask(f"run {calls[name]}"))
            if sys.stderr.isatty():
                print(f"\rround {done + 1} of {options.rounds}", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        peaks = {name: worker.ask("memory") for name, worker in workers.items()}
    return times, versions, peaks


def summarise(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Milliseconds from the seconds of all calls, as tersor.measure.latency has them."""
    times = np.concatenate([np.asarray(calls) for calls in rounds]) * 1e3
    low, median, high, p95 = np.quantile(times, [0.25, 0.5, 0.75, 0.95])
    return {
        "median": float(median),
        "p95": float(p95),
        "iqr": float(high - low),
        "n": len(times),
        "best": float(times.min()),
        "rounds": [float(np.median(calls)) * 1e3 for calls in rounds],
        "histogram": [float(value) for value in np.quantile(times, np.linspace(0, 1, 201))],
    }


def table(results: dict[str, Any], members: dict[str, dict[str, Any]]) -> str:
    """One line per model."""
    rows = [("model", "runtime", "threads", "batch", "median ms", "p95 ms", "peak MB", "median ms where it was built")]
    for name, found in results["artifacts"].items():
        time_, peak, built = found["latency"], found["peak_memory_bytes"], members[name]["built"]
        noisy = " (noisy)" if time_["iqr"] > 0.1 * time_["median"] else ""
        rows.append(
            (
                name,
                f"{found['runtime']} {results['machine']['versions'][found['runtime']]}",
                str(found["threads"]),
                str(found["batch"]),
                f"{time_['median']:.3f}{noisy}",
                f"{time_['p95']:.3f}",
                "-" if peak is None else f"{peak / 1e6:.1f}",
                "-" if built is None else f"{built['median_ms']:.3f}, {built['threads']} threads, {built['cpu']}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(widths[at]) for at, cell in enumerate(row)).rstrip() for row in rows)


def machine(versions: dict[str, str]) -> dict[str, Any]:
    """What a reader of the numbers needs to know."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name()[:200],
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {**versions, "numpy": np.__version__},
    }


def cpu_name() -> str:
    """The processor's or the board's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError):  # boards with an ARM processor name themselves here
        return Path("/proc/device-tree/model").read_text(errors="replace").strip("\0 \n")
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    return platform.processor() or platform.machine() or "unknown"


class Worker:
    """A child process that holds one model and times calls on request."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in exit
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and file, no shell
            [sys.executable, str(HERE / "bench.py"), "--serve", name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def ask(self, question: str) -> Any:
        """The answer, or an end that says what the process said last."""
        assert self.process.stdin is not None  # noqa: S101 - opened as a pipe
        assert self.process.stdout is not None  # noqa: S101 - likewise
        timer = threading.Timer(TIMEOUT_SECONDS, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:  # a broken pipe; Windows calls it an invalid argument
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            said = lines[-1] if lines else f"no answer within {TIMEOUT_SECONDS:.0f} s, or out of memory"
            raise SystemExit(f"bench.py: the process that measured {self.name} ended: {said} (exit status {code})")
        return json.loads(answer)


def serve(member: dict[str, Any], threads: int) -> None:
    """The measuring process: loads one model, then answers `version`, `run N` and `memory` on standard input."""
    with os.fdopen(os.dup(0)) as questions, os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a runtime prints is no answer
        runtime = member["runtime"]
        try:
            module = importlib.import_module(runtime)
        except ImportError as error:
            raise SystemExit(
                f"{runtime} does not import here ({error}); run: python -m pip install {runtime}"
            ) from None
        inputs = make_inputs(member["inputs"])
        idle = resident("VmRSS")
        reset_peak()
        call = OPEN[runtime](module, HERE / member["folder"], inputs, threads)
        reply(call, str(module.__version__).partition("-")[0], idle, (questions, answers))


def reply(call: Callable[[], object], version: str, idle: int | None, pipes: tuple[TextIO, TextIO]) -> None:
    """Answers in lines of JSON until the questions end."""
    questions, answers = pipes
    for question in questions:
        word, _, number = question.strip().partition(" ")
        answer: object = version
        if word == "run":
            times = []
            for _ in range(int(number)):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            answer = times
        elif word == "memory":
            peak = resident("VmHWM")
            answer = None if peak is None or idle is None else max(peak - idle, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def make_inputs(specs: Sequence[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """An array for every input."""
    generator = np.random.default_rng(0)
    return {
        spec["name"]: generator.standard_normal(spec["shape"]).astype(spec["dtype"])
        if spec["dtype"].startswith("float")
        else np.ones(spec["shape"], dtype=spec["dtype"])
        for spec in specs
    }


def open_onnxruntime(
    runtime: Any, folder: Path, inputs: dict[str, np.ndarray[Any, Any]], threads: int
) -> Callable[[], object]:
    """A call of model.onnx, with the options that tersor loads it with."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def open_openvino(
    runtime: Any, folder: Path, inputs: dict[str, np.ndarray[Any, Any]], threads: int
) -> Callable[[], object]:
    """A call of model.xml, with the options that tersor loads it with."""
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = runtime.Core().compile_model(str(folder / "model.xml"), "CPU", config).create_infer_request()
    return lambda: np.array(request.infer(inputs, share_inputs=True)[0])


OPEN = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def reset_peak() -> None:
    """Makes the kernel count peak memory from now on, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures every model of this kit on this machine.")
    parser.add_argument("--threads", type=_count, help="threads of every model; by default as many as it was built for")
    parser.add_argument("--rounds", type=_count, default=12, help="interleaved rounds (default 12)")
    parser.add_argument("--seconds", type=_seconds, default=0.3, help="of each model in each round (default 0.3)")
    parser.add_argument("--out", default="results.json", help="file to write (default results.json)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"expected 1 to 1000, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 3600, got {text}")
    return value


if __name__ == "__main__":
    main()
