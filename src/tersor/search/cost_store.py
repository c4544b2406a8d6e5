"""Keeps measured points from one search to the next: the machine and the model have not changed, so neither have they.

The files lie in the directory `costs` under `$TERSOR_CACHE`, else `$XDG_CACHE_HOME/tersor`, else `~/.cache/tersor`, one
for each fingerprint, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tersor.core import machine
from tersor.core.files import write_whole
from tersor.core.search import Choice
from tersor.errors import ConfigError, OutputDirectoryError
from tersor.search.costs import CostTable, Point, design
from tersor.search.space import Space

logger = logging.getLogger("tersor")

CHUNK = 4  # points that are measured between two savings
Measure = Callable[[Sequence[Choice]], list[Point]]
_POINTS = TypeAdapter(list[Point])


def fingerprint(space: Space, format: str, *, runtime: str, version: str, threads: int, batch: int) -> str:
    """What a latency depends on: this machine, the runtime and its version, threads, batch, model and number format.

    Args:
        space: Of the model.
        format: Number format.
        runtime: Name of the runtime.
        version: Of the runtime's package.
        threads: That one call may use.
        batch: Examples of one call.
    """
    here = (machine.cpu_name(), sorted(machine.cpu_flags()), os.cpu_count())
    facts = (*here, runtime, version, threads, batch, space.fingerprint, format)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def measure_table(
    space: Space,
    format: str,
    measure: Measure,
    *,
    fingerprint: str | None,
    points: int = 24,
    seed: int = 0,
) -> CostTable:
    """The cost table of a format, from points that are kept already and others that are measured now.

    Whatever is measured is kept at once, so an interrupted call goes on where it was.

    Args:
        space: Of the model.
        format: Number format.
        measure: Builds and times whole models; may leave out what cannot be built.
        fingerprint: Under which points are kept, see `fingerprint`; None keeps nothing.
        points: How many whole models; see `tersor.search.costs.design`.
        seed: Likewise.

    Raises:
        ConfigError: if `measure` returns something that was not asked for, or too few points for a table.
    """
    wanted = design(space, format, points=points, seed=seed)
    found = [] if fingerprint is None else load(fingerprint)
    known = {point.choice.key for point in found}
    missing = [choice for choice in wanted if choice.key not in known]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        measured = measure(chunk)
        unasked = {point.choice.key for point in measured} - {choice.key for choice in chunk}
        if unasked:
            raise ConfigError(f"measure: expected points of the {len(chunk)} choices given, got others: {unasked}")
        found += measured
        if fingerprint is not None:
            _keep(fingerprint, found)
    return CostTable.fit(space, format, found)


def _keep(fingerprint: str, points: Sequence[Point]) -> None:
    try:
        save(fingerprint, points)
    except OutputDirectoryError as error:
        logger.warning("measured latencies are not kept for the next search: %s", error)


def directory() -> Path:
    """Where the files are."""
    named, base = os.environ.get("TERSOR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    cache = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "tersor"
    return cache / "costs"


def load(fingerprint: str) -> list[Point]:
    """The points that are kept under a fingerprint; a damaged file is moved aside, with a warning."""
    path = _path(fingerprint)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("measured latencies of earlier searches cannot be read: %s", error)
        return []
    try:
        return _POINTS.validate_json(content, strict=True)
    except ValidationError as error:
        aside = path.with_suffix(".damaged")
        with suppress(OSError):
            path.replace(aside)
        reason = str(error.errors(include_url=False)[0]["msg"])
        logger.warning("%s is damaged (%s): it is moved to %s, and measured again", path, reason, aside.name)
        return []


def save(fingerprint: str, points: Sequence[Point]) -> None:
    """Keeps points under a fingerprint, instead of those that were there.

    Raises:
        OutputDirectoryError: if the place cannot be written.
    """
    write_whole(_path(fingerprint), _POINTS.dump_json(list(points), indent=1))


def _path(fingerprint: str) -> Path:
    if not fingerprint.isalnum():
        raise ConfigError(f"fingerprint: expected letters and digits, got {fingerprint!r}")
    return directory() / f"{fingerprint}.json"
