"""`tersor bench-kit`: packs artifacts for a machine without tersor; and what comes back from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tersor.errors import ConfigError
from tersor.pipeline.bench_kit import build_kit
from tersor.pipeline.imported import import_results
from tersor.report.units import one_line


def bench_kit_command(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts, or the run directories that hold them.")],
    out: Annotated[Path, typer.Option(help="New directory for the kit.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Pack ONNX and OpenVINO artifacts into a folder that measures them on another machine, without tersor."""
    kit = build_kit(artifacts, out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **kit.model_dump(mode="json")}, indent=2))
        return
    for member in kit.artifacts:
        size = sum(entry.size_bytes for entry in member.files.values())
        line = f"{member.name}: {member.runtime}, {member.precision}, {member.threads} threads, batch {member.batch}"
        typer.echo(f"{one_line(line)}, {size:,} bytes")
    typer.echo(
        f"kit: {out}\nthere: python bench.py; then here: tersor measure --import results.json ARTIFACT", err=True
    )


def import_command(results: Path, directory: Path, *, settings: Mapping[str, int | None], as_json: bool) -> None:
    """Brings results into an artifact and says which; `settings` are options that only measuring here has."""
    given = [f"--{name}" for name, value in settings.items() if value is not None]
    if given:
        raise ConfigError(
            f"--import brings in what was measured elsewhere, so {', '.join(given)} cannot be set here; "
            "leave them out, or give them to bench.py"
        )
    found = import_results(results, directory)
    if as_json:
        lists = {
            name: [item.model_dump(mode="json", exclude={"latency": {"rounds", "histogram"}}) for item in items]
            for name, items in (("imported", found.new), ("already_there", found.known))
        }
        typer.echo(json.dumps(lists, indent=2))
        return
    for word, items in (("imported", found.new), ("already there", found.known)):
        for item in items:
            time = item.latency
            typer.echo(
                f"{word}: {one_line(item.cpu)}, {one_line(item.runtime_version)}, {item.threads} threads, "
                f"batch {item.batch}: median {time.median:.3f} ms, p95 {time.p95:.3f} ms, n = {time.n}"
            )
