"""`tersor advise`: which recipe to start from, what is known of it, and what was ruled out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Annotated, cast

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.cli.loading import Weights, load_candidate, load_task
from tersor.core.budget import Budget
from tersor.core.target import Target
from tersor.hf import DYNAMIC, PREFIX
from tersor.report.units import byte_count, count, one_line, percent
from tersor.search.advisor import Advice, Recommendation, advise
from tersor.search.estimate import Estimate
from tersor.search.rules import Scenario


def advise_command(
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the module, or hf:DIR.")],
    task: Annotated[
        str,
        typer.Option(help="package.module:task, a tersor.Task or a function that returns one, or hf:train=FILE,…"),
    ],
    scenario: Annotated[str, typer.Option(help="edge, server, constrained or gpu.")],
    weights: Weights = None,
    target: Annotated[str, typer.Option(help="eager, inductor, onnxruntime or openvino.")] = "onnxruntime",
    max_drop: Annotated[float, typer.Option(help="Acceptable drop, 0.01 = one point.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say which recipe to start from for a model and a target, what is known of it, and what was ruled out."""
    place = Target(target, dynamic=DYNAMIC if task.startswith(PREFIX) else {})
    budget = Budget(max_drop=max_drop)
    with redirect_stdout(sys.stderr):  # whatever the model and its data print is no result
        candidate = load_candidate(model, weights)
        data = load_task(task, model, candidate)
        found = advise(candidate.module, data, scenario=cast("Scenario", scenario), target=place, budget=budget)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        Console().print(_shown(found))


def _shown(advice: Advice) -> RenderableType:
    profile = advice.profile
    lines = [
        f"family: {advice.family} ({count(profile.parameters)} parameters, {count(profile.macs)} MACs; convolutions "
        f"{percent(profile.convolution)}, recurrent layers {percent(profile.recurrent)} of them"
        f"{', with attention' if profile.attention else ''})",
        f"target: {advice.runtime} for {advice.scenario}; it has {', '.join(advice.abilities)}",
        "",
        f"recommended: {advice.recommended.preset}",
        *_told(advice.recommended),
    ]
    for other in advice.alternatives:
        lines += ["", f"alternative: {other.preset}", *_told(other)]
    table = Table("ruled out", "because", box=box.SIMPLE_HEAD, pad_edge=False)
    for item in advice.ruled_out:
        table.add_row(Text(one_line(item.method)), Text(one_line(item.reason)))
    following = [f"next: {line}" for line in advice.following]
    return Group(*map(_line, lines), Text(""), table, *map(_line, following))


def _told(choice: Recommendation) -> Iterator[str]:
    yield from (f"  because {reason}" for reason in choice.reasons)
    yield from (f"  measured elsewhere: {line}" for line in choice.expected if choice.measured)
    yield from (f"  {line}" for line in choice.expected if not choice.measured)
    yield f"  your model: {_counted(choice.estimate)}"
    yield f"  see {', '.join(choice.source)}"


def _counted(found: Estimate) -> str:
    return (
        f"weights {byte_count(found.float_bytes)} -> about {byte_count(found.bytes_after)}, "
        f"parameters {count(found.parameters)} -> {count(found.parameters_after)}, "
        f"MACs {count(found.macs)} -> {count(found.macs_after)} (counted, nothing was trained or timed)"
    )


def _line(text: str) -> Text:
    indent = len(text) - len(text.lstrip())
    return Text(" " * indent + one_line(text))
