"""Commands. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done (and certified, where a budget was given) · 1 unexpected error · 2 bad input · 3 finished, but
the budget is not certified · 4 an artifact or output directory cannot be read or written · 5 the target cannot
run it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from tersor.cli.advise import advise_command
from tersor.cli.bench_kit import bench_kit_command, import_command
from tersor.cli.demo import run_demo
from tersor.cli.distill import distill_command
from tersor.cli.loading import Weights, load_candidate, load_task
from tersor.cli.prune import prune_command
from tersor.cli.quantize import quantize_command
from tersor.cli.recipes import recipes_app
from tersor.core.artifact import verify
from tersor.core.budget import Budget
from tersor.core.files import write_whole
from tersor.core.report import Report
from tersor.core.signature import random_batch
from tersor.core.target import Target
from tersor.errors import (
    ArtifactError,
    ExportError,
    RuntimeUnavailableError,
    TersorError,
    UnsupportedError,
)
from tersor.hf import DYNAMIC, PREFIX
from tersor.measure import Contestant, Protocol, latency
from tersor.pipeline import Plan, Result, compress, make_plan
from tersor.pipeline.bench_kit import artifact_in
from tersor.report import render_html, render_table
from tersor.runtimes import Loaded, get_runtime

app = typer.Typer(
    help="Makes trained PyTorch models small and fast, and proves what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")
app.command("prune")(prune_command)
app.command("quantize")(quantize_command)
app.command("distill")(distill_command)
app.command("bench-kit")(bench_kit_command)
app.command("advise")(advise_command)

CORES = os.cpu_count() or 1
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[int, typer.Option(help="Fixes every random choice.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads to use.")]
Directory = Annotated[Path, typer.Argument(help="An artifact, or the run directory that holds it.")]

NOT_CERTIFIED = 3
EXIT_CODES: list[tuple[type[TersorError], int]] = [
    (ArtifactError, 4),
    (RuntimeUnavailableError, 5),
    (UnsupportedError, 5),
    (ExportError, 5),
    (TersorError, 2),
]


@app.command("compress")
def compress_command(
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the module, or hf:DIR.")],
    task: Annotated[
        str,
        typer.Option(help="package.module:task, a tersor.Task or a function that returns one, or hf:train=FILE,…"),
    ],
    out: Annotated[Path, typer.Option(help="Run directory; the artifact is OUT/artifact.")],
    weights: Weights = None,
    max_drop: Annotated[float | None, typer.Option(help="Acceptable drop, 0.01 = one point.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="Confidence of the certificate.")] = 0.95,
    target: Annotated[str, typer.Option(help="eager, inductor, onnxruntime or openvino.")] = "onnxruntime",
    threads: Threads = CORES,
    batch: Annotated[int, typer.Option(min=1, help="Batch size that it will run at.")] = 1,
    recipe: Annotated[str, typer.Option(help="auto, a preset or a YAML file.")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="With --recipe auto: search for so long.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of latency measurement.")] = 12,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a trained model under a budget, deploy it, measure it, certify what it cost."""
    budget = Budget(max_drop=max_drop, confidence=confidence, rounds=rounds, minutes=minutes)
    place = Target(target, threads=threads, batch=batch, dynamic=DYNAMIC if task.startswith(PREFIX) else {})
    start: Callable[..., Plan | Result] = make_plan if dry_run else partial(compress, out=out)
    with redirect_stdout(sys.stderr):  # whatever the model and its data print is no result
        candidate = load_candidate(model, weights)
        data = load_task(task, model, candidate)
        found = start(candidate, data, budget=budget, target=place, recipe=recipe, seed=seed)
    if isinstance(found, Plan):
        typer.echo(json.dumps({**found.as_data(), "out": str(out)}, indent=2, default=str))
    else:
        _finish(found, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    target: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    threads: Threads = CORES,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits, compress it under a budget, certify it."""
    _finish(run_demo(out, runtime=target, threads=threads, seed=seed), as_json)


@app.command()
def measure(
    directory: Directory,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of measurement, 12 by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default those of the manifest.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size; by default that of the manifest.")] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="Instead: bring in what a bench kit measured elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure an ONNX or OpenVINO artifact on this machine, with random inputs of its signature."""
    if results is not None:
        import_command(
            results, directory, settings={"rounds": rounds, "threads": threads, "batch": batch}, as_json=as_json
        )
        return
    path = artifact_in(directory)
    manifest = verify(path)
    changed = {key: value for key, value in (("threads", threads), ("batch", batch)) if value is not None}
    place = manifest.target.model_copy(update=changed)
    runtime = get_runtime(place.runtime)
    runtime.check_available()
    loaded = Loaded(runtime, path, manifest.signature, place)
    found = latency(
        {"artifact": Contestant(loaded, (runtime.package,))},
        random_batch(manifest.signature, place.batch),
        threads=place.threads,
        protocol=Protocol(rounds=rounds or 12),
    )["artifact"]
    numbers = {
        "latency_ms": found.latency.model_dump(exclude={"rounds", "histogram"}),
        "throughput": 1e3 * place.batch / found.latency.median,
        "peak_memory_bytes": found.peak_memory_bytes,
        "size_bytes": sum(entry.size_bytes for name, entry in manifest.files.items() if name.startswith("model.")),
        "runtime": place.runtime,
        "threads": place.threads,
        "batch": place.batch,
    }
    if as_json:
        typer.echo(json.dumps(numbers, indent=2))
    else:
        time = found.latency
        typer.echo(
            f"{place.runtime}, {place.threads} threads, batch {place.batch}: median {time.median:.3f} ms, "
            f"p95 {time.p95:.3f} ms, n = {time.n}, {numbers['size_bytes']:,} bytes"
        )


@app.command("report")
def report_command(
    directory: Directory,
    html: Annotated[Path | None, typer.Option(help="Also write the page to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the report of a finished run."""
    path = artifact_in(directory)
    verify(path)
    report = Report.model_validate_json((path / "report.json").read_text())
    if html is not None:
        write_whole(html, render_html(report).encode())
    _show(report, as_json)


@app.command("verify")
def verify_command(directory: Directory, as_json: Json = False) -> None:
    """Check every file of an artifact against its manifest."""
    manifest = verify(artifact_in(directory))
    if as_json:
        typer.echo(json.dumps({"intact": True, "files": sorted(manifest.files)}))
    else:
        typer.echo(f"intact: {len(manifest.files)} files, {manifest.name}, {manifest.precision}")


def main() -> None:
    """Runs the command line and turns errors into exit codes."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    logging.getLogger("tersor").setLevel(logging.INFO)
    try:
        app()
    except TersorError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))


def _finish(result: Result, as_json: bool) -> None:
    _show(result.report, as_json)
    page = (result.artifact / "report.html").absolute()
    typer.echo(f"artifact: {result.artifact}\nreport:   {page}", err=True)
    if result.report.verdict == "not certified":
        raise typer.Exit(NOT_CERTIFIED)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(render_table(report))
