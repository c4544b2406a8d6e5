"""Brings numbers that a bench kit measured on another machine into an artifact's report. Reading executes nothing."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from tersor.core.artifact import MANIFEST, FileEntry, Manifest, verify
from tersor.core.config import Config, explain
from tersor.core.files import disk_errors, flush, sha256, whole_directory
from tersor.core.report import Elsewhere, Latency, Report
from tersor.core.search import Choice
from tersor.errors import ConfigError, IntegrityError
from tersor.pipeline.bench_kit import artifact_in, model_files
from tersor.pipeline.documents import CARD, PAGE, REPORT, draw, read_report

SCHEMA_VERSION = 1
LARGEST_FILE = 64_000_000
QUANTILES = 201
REWRITTEN = (REPORT, PAGE, CARD)

Text = Annotated[str, Field(max_length=200)]
Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class Machine(Config):
    """Where it was measured."""

    platform: Text
    machine: Text
    cpu: Text
    cores: int = Field(ge=1, le=1_000_000)
    system: Text
    python: Text
    versions: dict[Text, Text]


class Measurement(Config):
    """One model of the kit."""

    runtime: Text
    threads: int = Field(ge=1, le=1024)
    batch: int = Field(ge=1, le=1_000_000_000)
    files: dict[Text, Hash]
    latency: Latency
    peak_memory_bytes: int | None = Field(ge=0, le=2**60)
    choice: Choice | None

    @field_validator("latency")
    @classmethod
    def _possible(cls, time: Latency) -> Latency:
        ordered = [time.best, time.median, time.p95]
        if not all(map(math.isfinite, [*ordered, time.iqr, *time.rounds, *time.histogram])):
            raise ValueError("every time must be finite")
        if min([*ordered, *time.rounds, *time.histogram]) <= 0 or time.iqr < 0:
            raise ValueError("every time must be positive")
        if len(time.histogram) != QUANTILES or any(low > high for low, high in pairwise(time.histogram)):
            raise ValueError(f"the histogram must have {QUANTILES} quantiles that never fall")
        if ordered != sorted(ordered):
            raise ValueError("the fastest call must not exceed the median, nor the median p95")
        if not 1 <= len(time.rounds) <= time.n <= 1_000_000_000:
            raise ValueError("every round must have at least one call")
        return time


class Results(Config):
    """What `bench.py` wrote."""

    schema_version: int
    kit: Hash
    machine: Machine
    date: Text
    rounds: int = Field(ge=1)
    seconds: float = Field(gt=0, allow_inf_nan=False)
    artifacts: dict[Text, Measurement]

    @field_validator("date")
    @classmethod
    def _is_date(cls, value: str) -> str:
        datetime.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> Results:
        for name, found in self.artifacts.items():
            if found.runtime not in self.machine.versions:
                raise ValueError(f"{name!r} ran in {found.runtime!r}, whose version is not among machine.versions")
            if len(found.latency.rounds) != self.rounds:
                raise ValueError(f"{name!r} has {len(found.latency.rounds)} rounds, expected {self.rounds}")
        return self


class Imported(NamedTuple):
    """What came into the report now, and what was in it before."""

    new: list[Elsewhere]
    known: list[Elsewhere]


def import_results(results: str | Path, directory: str | Path) -> Imported:
    """Brings what was measured elsewhere into the report of an artifact; what is there already stays single.

    The artifact is written anew beside its place and put in it when it is complete and verified.

    Args:
        results: The file that `bench.py` wrote.
        directory: An artifact that was in the kit, or the run directory that holds it.

    Raises:
        IntegrityError: if the file is damaged or impossible, none of its models is this artifact's, or a file of the
            artifact was changed.
        OutputDirectoryError: if the artifact cannot be written.
    """
    artifact = artifact_in(Path(directory)).resolve()
    manifest = verify(artifact)
    content = read_results(Path(results))
    expected = {name: entry.sha256 for name, entry in model_files(manifest).items()}
    found = [_elsewhere(content, item) for item in content.artifacts.values() if item.files == expected]
    if not expected or not found:
        raise IntegrityError(
            f"{results} has no numbers of {directory}: the SHA-256 of its model is "
            f"{', '.join(f'{name} {value[:12]}…' for name, value in expected.items())}, and none of "
            f"{sorted(content.artifacts)} is that; pass the artifact that the kit was built from, or build a new kit"
        )
    report = read_report(artifact)
    known = [item for item in found if item in report.elsewhere]
    new = [item for at, item in enumerate(found) if item not in [*report.elsewhere, *found[:at]]]
    if new:
        _rewrite(artifact, manifest, report.model_copy(update={"elsewhere": [*report.elsewhere, *new]}))
    return Imported(new, known)


def read_results(path: Path) -> Results:
    """Reads and checks a file of results; data only, nothing is executed.

    Raises:
        IntegrityError: if it is missing, too large, damaged, of a newer form, or says what cannot be.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is not a file; expected the results.json that bench.py wrote")
    if path.stat().st_size > LARGEST_FILE:
        raise IntegrityError(f"{path} has {path.stat().st_size:,} bytes; results of a bench kit are far smaller")
    try:
        text = path.read_bytes().decode()
        version = json.loads(text)["schema_version"]
        newer = version > SCHEMA_VERSION
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is truncated or no results of a bench kit ({type(error).__name__}: {str(error)[:200]}); "
            "copy it again, or run bench.py again"
        ) from None
    if newer:
        raise IntegrityError(f"{path} has schema version {version}, this tersor reads {SCHEMA_VERSION}: upgrade tersor")
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        raise IntegrityError(f"{path} is not valid: {explain(error, 'results')[:600]}") from None
    except ConfigError as error:
        raise IntegrityError(f"{path} is not valid: {str(error)[:600]}") from None


def points_of(results: Results) -> list[tuple[Choice, float]]:
    """Median milliseconds of every model of the kit that is a point of a search space."""
    return [(item.choice, item.latency.median) for item in results.artifacts.values() if item.choice is not None]


def _elsewhere(results: Results, found: Measurement) -> Elsewhere:
    place = results.machine
    return Elsewhere(
        machine=place.machine,
        cpu=place.cpu,
        cores=place.cores,
        system=place.system,
        runtime_version=f"{found.runtime} {place.versions[found.runtime]}",
        date=results.date,
        threads=found.threads,
        batch=found.batch,
        latency=found.latency,
        peak_memory_bytes=found.peak_memory_bytes,
    )


def _rewrite(artifact: Path, manifest: Manifest, report: Report) -> None:
    """Puts a complete copy with another report in the place of the artifact."""
    kept = {name: entry for name, entry in manifest.files.items() if name not in REWRITTEN}
    with disk_errors(artifact), tempfile.TemporaryDirectory(prefix=f".{artifact.name}.", dir=artifact.parent) as hold:
        fresh, old = Path(hold) / "new", Path(hold) / "old"
        with whole_directory(fresh) as scratch:
            _copy(artifact, scratch)
            draw(report, scratch, manifest=manifest, hashes={name: entry.sha256 for name, entry in kept.items()})
            drawn = {
                name: FileEntry(sha256=sha256(scratch / name), size_bytes=(scratch / name).stat().st_size)
                for name in REWRITTEN
            }
            files = dict(sorted({**kept, **drawn}.items()))
            manifest.model_copy(update={"files": files}).write(scratch)
        verify(fresh)
        artifact.rename(old)
        try:
            fresh.rename(artifact)
        except OSError:
            old.rename(artifact)
            raise
        flush(artifact.parent)


def _copy(artifact: Path, scratch: Path) -> None:
    """Copies all but what is drawn anew, file by file: `shutil.copytree` would hide what the system said."""
    for path in sorted(artifact.rglob("*")):
        place = path.relative_to(artifact)
        if path.is_dir() and not path.is_symlink():
            (scratch / place).mkdir()
        elif place.as_posix() not in {*REWRITTEN, MANIFEST}:
            shutil.copy2(path, scratch / place, follow_symlinks=False)
