"""`compress`: from a trained model and a budget to a deployed, measured, certified artifact."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from torch import nn

from tersor.core.artifact import (
    PLAIN_SCHEMA,
    SCHEMA_VERSION,
    SURGERY,
    Manifest,
    attach,
    describe_files,
    dump_surgeries,
    verify,
)
from tersor.core.budget import Budget
from tersor.core.candidate import Candidate
from tersor.core.context import Progress
from tersor.core.files import whole_directory
from tersor.core.machine import cpu_flags, versions
from tersor.core.recipe import Recipe
from tersor.core.report import Report
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.pipeline.assemble import assemble
from tersor.pipeline.documents import draw
from tersor.pipeline.measuring import Exported, certificate_for, export, loaded_from, measure_facts
from tersor.pipeline.plan import Plan, make_plan
from tersor.pipeline.progress import shown
from tersor.pipeline.run_directory import RunDirectory
from tersor.pipeline.search import Found, searched
from tersor.pipeline.steps import run_recipe
from tersor.report import render_table
from tersor.runtimes.parity import check_parity
from tersor.search.settings import Search
from tersor.train.parallel import refuse_several


@dataclass(frozen=True)
class Result:
    """What `compress` hands back.

    Attributes:
        artifact: The directory to deploy.
        report: All numbers.
        model: The compressed model in PyTorch; for quantized ones the simulation of the deployed arithmetic.
    """

    artifact: Path
    report: Report
    model: nn.Module

    @property
    def certified(self) -> bool:
        """Whether the budget is proven to hold."""
        return self.report.certificate is not None and self.report.certificate.certified

    @property
    def html(self) -> Path:
        """The report as one offline page."""
        return self.artifact / "report.html"

    def __rich__(self) -> RenderableType:
        return render_table(self.report)

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def compress(
    model: nn.Module | Candidate,
    task: Task,
    *,
    out: str | Path,
    budget: Budget | None = None,
    target: Target | None = None,
    recipe: str | Path | Recipe | Search = "auto",
    seed: int = 0,
) -> Result:
    """Compresses `model` under a budget, deploys it, measures it and certifies what it cost.

    `model` stays as it is. Calling again with the same arguments resumes after a crash, or returns the finished
    result; other arguments on the same directory are refused. A budget that is not met is no error: the result
    is returned with `certified` False and the report says so.

    ::

        result = tersor.compress(model, task, out="runs/my-model",
                                 budget=tersor.Budget(max_drop=0.01),
                                 target=tersor.Target("openvino", threads=2))

    Args:
        model: A trained module; or, if it was pruned before, a `tersor.Candidate` with its surgeries and masks, so that
            the artifact knows the way from the model that you can build.
        task: Data and metric.
        out: The run directory; the artifact is `out/artifact`, the certify ledger stands beside `out`.
        budget: What may be lost; by default one point at 95 %.
        target: Where it will run; by default ONNX Runtime on all cores.
        recipe: `auto`, a preset's name, a YAML path, a `Recipe`, or a `tersor.search.Search` that finds one. `auto`
            searches where the budget has minutes, and takes a preset otherwise.
        seed: Fixes every random choice: the same seed gives the same bits on the same machine.

    Raises:
        TersorError: see `tersor.errors`; whatever is wrong is said before work begins where that is possible.
    """
    refuse_several("tersor.compress")
    plan = make_plan(model, task, budget=budget or Budget(), target=target or Target(), recipe=recipe, seed=seed)
    run = RunDirectory(Path(out), plan.fingerprint())
    run.claim()
    with shown() as progress:
        if plan.search is None:
            candidate = run_recipe(plan, run, progress)
            if not run.artifact.exists():
                deploy(plan, run, candidate, progress)
        else:
            found = searched(plan, run, progress)
            candidate = found.candidate
            if not run.artifact.exists():
                deploy(found.plan, run, candidate, progress, found)
    verify(run.artifact)
    report = Report.model_validate_json((run.artifact / "report.json").read_text())
    return Result(run.artifact, report, candidate.runnable)


def deploy(plan: Plan, run: RunDirectory, candidate: Candidate, progress: Progress, found: Found | None = None) -> None:
    """Exports, checks, measures, certifies and writes the artifact, all or nothing.

    What a search has found was certified already: the very files are deployed.
    """
    with _scratch() as scratch, whole_directory(run.artifact) as directory:
        exported = export(plan, candidate, directory) if found is None else copied(plan, found, directory)
        check_parity(exported.loaded, candidate, plan.task.example)
        (scratch / "uncompressed").mkdir()
        uncompressed = export(plan, Candidate(plan.original), scratch / "uncompressed")
        facts, compared = measure_facts(plan, exported, uncompressed, scratch, progress)
        if found is None:
            certificate = certificate_for(plan, exported, run.identity, run.path.absolute().parent, progress)
        else:
            certificate = found.certificate
        report = assemble(plan, exported, facts, compared, certificate)
        if found is not None:
            report = report.model_copy(update={"search": found.record})
        write_documents(plan, candidate, report, directory)


def copied(plan: Plan, found: Found, directory: Path) -> Exported:
    """The model files of a search's winner, in the artifact."""
    shutil.copytree(found.files, directory, dirs_exist_ok=True)
    files = tuple(sorted(path for path in directory.rglob("*") if path.is_file()))
    return Exported(loaded_from(plan, found.candidate, directory), found.candidate, files)


def write_documents(plan: Plan, candidate: Candidate, report: Report, directory: Path) -> None:
    """Report, model card and manifest beside the model files."""
    if candidate.plan is not None:
        (directory / "quantization.json").write_text(candidate.plan.model_dump_json() + "\n")
    if candidate.surgeries:
        (directory / SURGERY).write_bytes(dump_surgeries(candidate.surgeries))
    attach(directory, plan.task.attachments)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION if candidate.surgeries and plan.runtime.needs_code else PLAIN_SCHEMA,
        name=report.name,
        target=plan.target,
        signature=plan.signature,
        precision=candidate.precision,
        class_names=list(plan.task.class_names),
        preprocessing=plan.task.preprocessing,
        recipe=plan.recipe.as_data(),
        seed=plan.seed,
        versions=versions(),
        cpu_flags=sorted(cpu_flags()),
        weight_bits=candidate.plan.weight_bits if candidate.plan is not None else None,
        files={},
    )
    hashes = {name: entry.sha256 for name, entry in describe_files(directory).items()}
    draw(report, directory, manifest=manifest, hashes=hashes)
    manifest.model_copy(update={"files": describe_files(directory)}).write(directory)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tersor-") as path:
        yield Path(path)
