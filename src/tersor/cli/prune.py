"""`tersor prune`: removes whole units of a model, shows what went and what could not, and writes the result."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from tersor.cli.loading import Weights, load_candidate, load_task
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.report import FrozenPart
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import ConfigError, CoverageError, OutputDirectoryError
from tersor.graph import Coupling, couple
from tersor.prune import Structured, write_pruned
from tersor.prune.steps import Pruned, coverage, examples, summary, touched
from tersor.report.units import one_line

NAMES_SHOWN = 3


def prune_command(
    model: Annotated[str, typer.Option(help="package.module:build, a function that returns the module.")],
    task: Annotated[str, typer.Option(help="package.module:task, a tersor.Task or a function that returns one.")],
    out: Annotated[
        Path | None, typer.Option(help="New directory for weights and surgery; else nothing is kept.")
    ] = None,
    weights: Weights = None,
    amount: Annotated[float | None, typer.Option(help="Share of the units that goes; 0.5 without a target.")] = None,
    target: Annotated[str | None, typer.Option(help="Instead: macs=0.7, parameters=0.5 or bytes=1e6.")] = None,
    criterion: Annotated[str, typer.Option(help="The lowest scores go.")] = "l2",
    allocation: Annotated[str, typer.Option(help="uniform, global or erk.")] = "uniform",
    round_to: Annotated[int, typer.Option(min=1, help="Widths become multiples of this.")] = 1,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob pattern of families that stay whole.")] = None,
    compensate: Annotated[bool, typer.Option("--compensate", help="Refit the weights behind what goes.")] = False,
    verify: Annotated[str, typer.Option(help="full, together or off.")] = "full",
    samples: Annotated[int, typer.Option(min=1, help="Examples of the calibrate split to measure on.")] = 128,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find out what could go; change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Remove whole channels, heads and neurons of a model, and prove that nothing broke."""
    settings: dict[str, Any] = {
        "amount": amount,
        "target": None if target is None else _goal(target),
        "criterion": criterion,
        "allocation": allocation,
        "round_to": round_to,
        "exclude": exclude or (),
        "compensate": compensate,
        "verify": verify,
        "samples": samples,
    }
    step = Structured(**settings)
    if out is not None and out.exists():
        raise OutputDirectoryError(f"{out} already exists; choose another directory or remove it")
    with redirect_stdout(sys.stderr):  # whatever the model and its data print is no result
        candidate = load_candidate(model, weights)
        data = load_task(task, model, candidate)
        if dry_run:
            found: _Coupled | _Done = _Coupled(candidate.module, data, step)
        else:
            found = _Done(candidate, data, step)
            found.write(out)
    if as_json:
        typer.echo(json.dumps(found.as_data(), indent=2))
    else:
        Console().print(found.table())


def _goal(text: str) -> dict[str, float]:
    name, _, value = text.partition("=")
    try:
        return {name.strip(): float(value)}
    except ValueError:
        raise ConfigError(f"--target: expected e.g. macs=0.7, got {text!r}") from None


class _Coupled:
    """What could go, without removing it."""

    def __init__(self, module: nn.Module, task: Task, step: Structured) -> None:
        started = time.perf_counter()
        self.coupling: Coupling = couple(module, examples(task))
        self.seconds = time.perf_counter() - started
        sizes = {path: parameter.numel() for path, parameter in module.named_parameters()}
        reasons = {family.name: step.wants(family) for family in self.coupling.families}
        self.families = [family for family in self.coupling.families if not reasons[family.name]]
        self.frozen = [FrozenPart(name=item.name, reason=item.reason) for item in self.coupling.frozen]
        self.frozen += [FrozenPart(name=name, reason=reason) for name, reason in reasons.items() if reason]
        self.coverage = coverage(touched(self.families), sizes)
        self.parameters = sum(sizes.values())
        if not self.families:
            raise CoverageError(
                f"nothing of {type(module).__name__} can be pruned: "
                + ("; ".join(f"{item.name}: {item.reason}" for item in self.frozen[:8]) or "it has no parameters")
            )

    def as_data(self) -> dict[str, Any]:
        return {
            "coverage": self.coverage,
            "parameters": self.parameters,
            "families": [{"name": f.name, "kind": f.kind, "units": f.size} for f in self.families],
            "frozen": [item.model_dump() for item in self.frozen],
            "unused": list(self.coupling.unused),
            "seconds": {"coupling": self.seconds},
        }

    def table(self) -> RenderableType:
        rows = [(family.name, family.kind, str(family.size)) for family in self.families]
        lines = [
            f"{len(rows)} families touch {self.coverage:.1%} of {self.parameters:,} parameters; not verified yet",
            *_reasons(self.frozen),
        ]
        return Group(_rows(("family", "kind", "units"), rows), *map(Text, lines))


class _Done:
    """What went."""

    def __init__(self, start: Candidate, task: Task, step: Structured) -> None:
        module = frozen_copy(start.module)
        self.done: Pruned = step.prune(module, Context(task, Target("eager"), start.module))
        self.candidate = start.after(self.done.report.surgery, module)

    def write(self, out: Path | None) -> None:
        """Weights, and all surgeries since the model that was built."""
        if out is None:
            return
        write_pruned(out, self.candidate.module, self.candidate.surgeries)
        typer.echo(f"pruned model: {out}", err=True)

    def as_data(self) -> dict[str, Any]:
        pruning, report = self.done.pruning, self.done.report
        return {
            "params_before": pruning.parameters_before,
            "params_after": pruning.parameters_after,
            "macs_before": pruning.macs_before,
            "macs_after": pruning.macs_after,
            "amount": pruning.amount,
            "coverage": pruning.coverage,
            "families": [family.model_dump(exclude={"layers"}) for family in pruning.families],
            "frozen": [item.model_dump() for item in pruning.frozen],
            "unused": pruning.unused,
            "max_error": pruning.max_error,
            "seconds": dict(report.seconds),
            "notes": report.notes,
        }

    def table(self) -> RenderableType:
        pruning, report = self.done.pruning, self.done.report
        rows = [(family.name, family.kind, str(family.units), str(family.kept)) for family in pruning.families]
        lines = [
            *summary(pruning.model_copy(update={"frozen": []})),
            *report.notes,
            *_reasons(pruning.frozen),
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items()),
        ]
        return Group(_rows(("family", "kind", "units", "kept"), rows), *(Text(one_line(line)) for line in lines))


def _rows(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, header in enumerate(headers):
        table.add_column(header, justify="right" if position > 1 else "left")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def _reasons(frozen: Iterable[FrozenPart]) -> list[str]:
    """One line for each reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for item in frozen:
        names[item.reason].append(item.name)
    return [
        f"frozen: {', '.join(found[:NAMES_SHOWN])}"
        + (f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else "")
        + f": {one_line(reason)}"
        for reason, found in names.items()
    ]
