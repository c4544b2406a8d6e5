"""`tersor distill`: trains a smaller student to answer like a model, and writes its weights."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.text import Text
from torch import nn

from tersor.cli.loading import Weights, load_candidate, load_object, load_task
from tersor.core.surgery import Surgery
from tersor.core.task import Task
from tersor.distill import Distilled, train
from tersor.distill.students import every_kth, scaled
from tersor.errors import ConfigError, OutputDirectoryError, UnsupportedError
from tersor.pipeline.progress import shown
from tersor.prune import write_pruned
from tersor.train import Schedule, answers_of, evaluation
from tersor.train.parallel import refuse_several
from tersor.train.randomness import callers_kept, seed_all

STUDENT = "student"


def distill_command(
    model: Annotated[str, typer.Option(help="The teacher: package.module:build, or hf:DIR.")],
    task: Annotated[
        str,
        typer.Option(help="package.module:task, a tersor.Task or a function that returns one, or hf:train=FILE,…"),
    ],
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in OUT/student, the trained student.")],
    weights: Weights = None,
    student: Annotated[str | None, typer.Option(help="package.module:build, a student of your own.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Or: so many of the teacher's layers.")] = None,
    width: Annotated[float | None, typer.Option(help="Or: the teacher's architecture at this share of width.")] = None,
    depth: Annotated[float | None, typer.Option(help="Or, and: at this share of depth.")] = None,
    losses: Annotated[
        str, typer.Option(help="Terms in YAML, as in '[{kd: {weight: 0.9}}, task]'.")
    ] = "[{kd: {weight: 0.9}}, {task: {weight: 0.1}}]",
    schedule: Annotated[
        str, typer.Option(help="Settings of the training in YAML, as in '{epochs: 3, lr: 0.02}'.")
    ] = "{}",
    cache: Annotated[bool, typer.Option("--cache", help="Ask the teacher once for each example.")] = False,
    seed: Annotated[int, typer.Option(help="Fixes every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Train a student to answer like a model; a call that was interrupted goes on when it is repeated."""
    refuse_several("tersor distill")
    if (out / STUDENT).exists():
        raise OutputDirectoryError(f"{out / STUDENT} already exists; choose another directory or remove it")
    terms, plan = _yaml(losses, "--losses"), Schedule(**_settings(schedule))
    with redirect_stdout(sys.stderr):  # whatever the model and its data print is no result
        candidate = load_candidate(model, weights)
        teacher = candidate.module
        data = load_task(task, model, candidate)
        fresh, surgery = _student(teacher, data, student=student, layers=layers, width=width, depth=depth, seed=seed)
        with shown() as progress:
            done = train(
                fresh, teacher, data, losses=terms, schedule=plan, seed=seed, out=out, cache=cache,
                progress=lambda steps, total, facts: progress("distill", steps, total, facts),
            )  # fmt: skip
        surgeries = (*candidate.surgeries, surgery) if surgery is not None else ()
        write_pruned(out / STUDENT, done.model, surgeries)
        found = _as_data(teacher, done, data)
    typer.echo(f"student: {out / STUDENT}", err=True)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        lines = [f"{name.replace('_', ' ')}: {_told(value)}" for name, value in found.items() if name != "notes"]
        Console().print(Text("\n".join([*lines, *found["notes"]])))


def _student(
    teacher: nn.Module,
    task: Task,
    *,
    student: str | None,
    layers: int | None,
    width: float | None,
    depth: float | None,
    seed: int,
) -> tuple[nn.Module, Surgery | None]:
    """The student to train, and how it is cut from the teacher, if it is."""
    ways = [student is not None, layers is not None, width is not None or depth is not None]
    if sum(ways) != 1:
        raise ConfigError("name one student: --student package.module:build, --layers, or --width and --depth")
    if layers is not None:
        example = task.example(2)
        cut = every_kth(teacher, layers=layers, example_inputs=example.kwargs or example.args)
        if cut.surgery is None:
            raise UnsupportedError(
                "such a student cannot be written down as a surgery of the teacher; use every_kth of "
                "tersor.distill.students in Python and save it with its own configuration"
            )
        return cut.module, cut.surgery
    if student is None:
        shares = {name: share for name, share in (("width", width), ("depth", depth)) if share is not None}
        return scaled(teacher, **shares, seed=seed), None
    with callers_kept(torch.device("cpu")):  # the same weights whenever the call is repeated
        seed_all(seed, "student")
        found = load_object(student, "--student")
        module = found if isinstance(found, nn.Module) else found()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"--student: {student} must give a torch.nn.Module, got {type(module).__name__}")
    return module, None


def _as_data(teacher: nn.Module, done: Distilled, task: Task) -> dict[str, Any]:
    """Numbers of the student beside the teacher's."""
    evaluate = evaluation(task, answers_of(teacher, task.output))
    sign = 1 if task.metric.higher_is_better else -1
    found: dict[str, Any] = {
        "teacher_parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "student_parameters": sum(parameter.numel() for parameter in done.model.parameters()),
    }
    if evaluate is not None:
        found[f"teacher_{task.metric.name}_on_search"] = sign * evaluate(teacher)
        found[f"student_{task.metric.name}_on_search"] = sign * evaluate(done.model)
    return found | {"steps": done.trained.steps, "losses": done.trained.losses, "notes": list(done.notes)}


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{item:.4f}" for item in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _yaml(text: str, option: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: not valid YAML: {' '.join(str(error).split())}") from None


def _settings(text: str) -> dict[str, Any]:
    found = _yaml(text, "--schedule")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--schedule: expected settings such as '{{epochs: 3, lr: 0.02}}', got {text!r}")
    return found
