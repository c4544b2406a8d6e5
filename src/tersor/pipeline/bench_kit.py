"""Builds a bench kit: a folder that measures artifacts on a machine that has neither tersor nor PyTorch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from tersor.core.artifact import FileEntry, Manifest, verify
from tersor.core.config import Config
from tersor.core.files import whole_directory
from tersor.core.report import Report
from tersor.core.search import Choice
from tersor.core.signature import TensorSpec, random_batch
from tersor.errors import ConfigError, UnsupportedError
from tersor.pipeline.documents import read_report
from tersor.report.card import markdown

KIT, BENCH, CARD = "kit.json", "bench.py", "README.md"
SCHEMA_VERSION = 1
PACKED = ("onnxruntime", "openvino")
DTYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})
SOURCE = Path(__file__).parent / "kit" / BENCH
TEMPLATE = """\
# Bench kit

Measures the models below on this machine. It needs Python 3.9 or later, no network once the packages are there, and
runs on Linux, macOS and Windows. Everything that is executed is in `bench.py`.

1. `python -m pip install numpy {runtimes}`
2. `python bench.py --threads 4` (as many as the model will get; by default as many as it was built for)
3. where tersor and the artifact are: `tersor measure --import results.json ARTIFACT`

Made with {versions}. The same version gives comparable numbers; an older one may refuse the files.

| model | runtime | precision | recipe | threads | batch |
|---|---|---|---|---:|---:|
{rows}
"""


class Built(Config):
    """Where the artifact was measured when it was made, and how fast it was there."""

    cpu: str
    system: str
    date: str
    threads: int
    median_ms: float
    p95_ms: float


class Member(Config):
    """One model of a kit."""

    name: str
    folder: str = Field(description="of its files, relative to the kit")
    runtime: str
    version: str = Field(description="of the runtime that the files were made with; empty: unknown")
    precision: str
    recipe: str
    threads: int
    batch: int
    inputs: list[TensorSpec] = Field(description="with sizes instead of labels")
    files: dict[str, FileEntry]
    built: Built | None = Field(description="None: it was not timed")
    choice: Choice | None = Field(default=None, description="the point of a search space that it is")


class Kit(Config):
    """What `kit.json` holds."""

    schema_version: int = SCHEMA_VERSION
    artifacts: list[Member]


class _Source(NamedTuple):
    artifact: Path
    manifest: Manifest
    report: Report
    choice: Choice | None


def build_kit(
    artifacts: Sequence[str | Path], out: str | Path, *, choices: Mapping[str | Path, Choice] | None = None
) -> Kit:
    """Writes a folder that measures artifacts on another machine.

    ::

        build_kit(["runs/int8", "runs/float32"], "kit")
        # elsewhere: python bench.py; then: tersor measure --import results.json runs/int8

    Args:
        artifacts: Artifacts, or run directories that hold one. All are verified before anything is written.
        out: The new folder; it appears complete or not at all.
        choices: The points of a search space that some of `artifacts` are; they come back in the results.

    Raises:
        UnsupportedError: if an artifact needs code, or has an input that NumPy cannot make.
        IntegrityError: if a file of an artifact was changed.
        ConfigError: if no artifact was given.
        OutputDirectoryError: if `out` exists or cannot be written.
    """
    if not artifacts:
        raise ConfigError("bench-kit: expected at least one artifact, got none")
    sources = [_source(Path(given), (choices or {}).get(given)) for given in artifacts]
    names = _names([source.artifact for source in sources])
    members = [_member(name, source) for name, source in zip(names, sources, strict=True)]
    kit = Kit(artifacts=members)
    with whole_directory(Path(out)) as directory:
        shutil.copyfile(SOURCE, directory / BENCH)
        (directory / KIT).write_text(kit.model_dump_json(indent=1) + "\n")
        (directory / CARD).write_text(_card(kit))
        for member, source in zip(members, sources, strict=True):
            folder = directory / member.folder
            folder.mkdir(parents=True)
            for file in member.files:
                shutil.copyfile(source.artifact / file, folder / file)
    return kit


def artifact_in(directory: Path) -> Path:
    """The artifact that `directory` is, or that it holds as a run directory."""
    inside = directory / "artifact"
    return inside if not (directory / "manifest.json").exists() and inside.is_dir() else directory


def model_files(manifest: Manifest) -> dict[str, FileEntry]:
    """The files that the runtime loads; attached ones lie in folders."""
    return {name: entry for name, entry in manifest.files.items() if name.startswith("model.")}


def _source(given: Path, choice: Choice | None) -> _Source:
    artifact = artifact_in(given)
    manifest = verify(artifact)
    if manifest.target.runtime not in PACKED:
        raise UnsupportedError(
            f"bench-kit: {given} is an artifact for {manifest.target.runtime!r}, which needs your model's code and "
            f"PyTorch where it runs; compress it for {' or '.join(PACKED)} (--target) and pack that"
        )
    for spec in manifest.signature.inputs:
        if spec.dtype not in DTYPES:
            raise UnsupportedError(
                f"bench-kit: {given} takes {spec.name!r} as {spec.dtype}, which NumPy does not have; compress a model "
                f"that takes one of {sorted(DTYPES)}"
            )
    return _Source(artifact, manifest, read_report(artifact), choice)


def _names(artifacts: Sequence[Path]) -> list[str]:
    """A name for each that is a folder's name on any system, different even where upper and lower case are one."""
    names: list[str] = []
    for artifact in artifacts:
        place = artifact.resolve()
        name = place.parent.name if place.name == "artifact" and place.parent.name else place.name
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "model"
        taken, number = {other.lower() for other in names}, 2
        unique = plain
        while unique.lower() in taken:
            unique, number = f"{plain}-{number}", number + 1
        names.append(unique)
    return names


def _member(name: str, source: _Source) -> Member:
    manifest, report = source.manifest, source.report
    target, time, place = manifest.target, report.deployed.latency_ms, report.environment
    batch = random_batch(manifest.signature, target.batch)
    shapes = [list(tensor.shape) for tensor in batch.tensors().values()]
    return Member(
        name=name,
        folder=f"models/{name}",
        runtime=target.runtime,
        version=manifest.versions.get(target.runtime, ""),
        precision=manifest.precision,
        recipe=str(manifest.recipe.get("name", "")),
        threads=target.threads,
        batch=target.batch,
        inputs=[
            TensorSpec(name=spec.name, dtype=spec.dtype, shape=[int(size) for size in shape])
            for spec, shape in zip(manifest.signature.inputs, shapes, strict=True)
        ],
        files=model_files(manifest),
        built=None
        if time is None
        else Built(
            cpu=place.cpu,
            system=place.system,
            date=place.date,
            threads=place.threads,
            median_ms=time.median,
            p95_ms=time.p95,
        ),
        choice=source.choice,
    )


def _card(kit: Kit) -> str:
    runtimes = sorted({member.runtime for member in kit.artifacts})
    versions = sorted({f"{member.runtime} {member.version}".strip() for member in kit.artifacts})
    rows = (
        (member.name, member.runtime, member.precision, member.recipe, str(member.threads), str(member.batch))
        for member in kit.artifacts
    )
    return TEMPLATE.format(
        runtimes=" ".join(runtimes),
        versions=", ".join(markdown(version) for version in versions),
        rows="\n".join(f"| {' | '.join(map(markdown, row))} |" for row in rows),
    )
