"""`tersor quantize`: what rounding each layer costs, or a run whose recipe is a single quantization."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tersor.cli.loading import Weights, load_candidate, load_task
from tersor.core.budget import Budget
from tersor.core.recipe import Recipe
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.errors import ConfigError
from tersor.hf import DYNAMIC, PREFIX
from tersor.pipeline import compress
from tersor.quantize import sensitivity
from tersor.recipes.load import step_types
from tersor.report import render_table

CORES = os.cpu_count() or 1


def quantize_command(
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the module, or hf:DIR.")],
    task: Annotated[
        str,
        typer.Option(help="package.module:task, a tersor.Task or a function that returns one, or hf:train=FILE,…"),
    ],
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; the artifact is OUT/artifact.")] = None,
    mode: Annotated[str, typer.Option(help="static, dynamic, weight-only, mixed or fallback.")] = "static",
    weight_bits: Annotated[int | None, typer.Option(help="Bits of the weights.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of the activations.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="With mixed: bits per weight on average.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="With --sensitivity and mixed: the widths to try, as in 2,4,8.")
    ] = None,
    show_sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Only show what rounding each layer alone costs.")
    ] = False,
    measure: Annotated[
        str | None, typer.Option(help="With --sensitivity, mixed and fallback: output or fisher.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration examples to use.")] = None,
    target: Annotated[str, typer.Option(help="eager, inductor, onnxruntime or openvino.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads to use.")] = CORES,
    batch: Annotated[int, typer.Option(min=1, help="Batch size that it will run at.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of latency measurement.")] = 12,
    seed: Annotated[int, typer.Option(help="Fixes every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Quantize a model and deploy it, without a certificate; or show how sensitive its layers are."""
    place = Target(target, threads=threads, batch=batch, dynamic=DYNAMIC if task.startswith(PREFIX) else {})
    widths = None if bits is None else _widths(bits)
    settings = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "average_bits": average_bits,
        "choices": widths,
        "measure": measure,
        "samples": samples,
    }
    step = None if show_sensitivity else _step(mode, settings)
    if step is not None and out is None:
        raise ConfigError("--out: name a run directory, or ask for --sensitivity, which keeps nothing")
    with redirect_stdout(sys.stderr):  # whatever the model and its data print is no result
        candidate = load_candidate(model, weights)
        data = load_task(task, model, candidate)
        if step is None or out is None:
            options: dict[str, Any] = {"bits": widths, "measure": measure, "samples": samples}
            given = {name: value for name, value in options.items() if value is not None}
            found = sensitivity(candidate, data, target=place, activation_bits=activation_bits, **given)
            printed, table = json.dumps(found.as_data(), indent=2), found.__rich__()
        else:
            recipe, budget = Recipe([step], name=step.name), Budget(max_drop=None, rounds=rounds)
            result = compress(candidate, data, budget=budget, target=place, recipe=recipe, out=out, seed=seed)
            printed, table = result.report.model_dump_json(indent=2), render_table(result.report)
            typer.echo(f"artifact: {result.artifact}\nreport:   {result.html.absolute()}", err=True)
    if as_json:
        typer.echo(printed)
    else:
        Console().print(table)


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--bits: expected numbers like 2,4,8, got {text!r}") from None


def _step(mode: str, settings: dict[str, Any]) -> Step:
    """The step of this mode with the settings that were given; `bits` stands for `weight_bits` where it is called so.

    Raises:
        ConfigError: if there is no such mode, or it has no such setting.
    """
    known = {name: kind for name, kind in step_types().items() if kind.kind == "quantize"}
    name = f"quantize.{mode.replace('-', '_')}"
    if name not in known:
        modes = sorted(name.partition(".")[2].replace("_", "-") for name in known)
        raise ConfigError(f"--mode: expected one of {modes}, got {mode!r}")
    fields, given = known[name].model_fields, {}
    for setting, value in settings.items():
        if value is None:
            continue
        field = "bits" if setting == "weight_bits" and setting not in fields and "bits" in fields else setting
        if field not in fields:
            option = "bits" if setting == "choices" else setting.replace("_", "-")
            raise ConfigError(f"--{option}: --mode {mode} has no such setting; it has {sorted(fields)}")
        given[field] = value
    return known[name](**given)
