"""Records of trials as they stand in a database, and what can be read of a SQLite file that was damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from pydantic import ValidationError

from tersor.core.files import disk_errors, flush
from tersor.core.search import TrialRecord
from tersor.errors import ConfigError, IntegrityError, OutputDirectoryError
from tersor.search.database import PATIENCE

RECORD, IDENTITY = "record", "identity"
_SMALLEST_ROW = 32  # bytes; bounds how many rows a file can hold
_ELSEWHERE = {"SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_LOCKED", "SQLITE_PERM", "SQLITE_READONLY"}

logger = logging.getLogger("tersor")


def seal(record: TrialRecord) -> dict[str, str]:
    """A record as it is stored, with a hash by which damage shows."""
    text = record.model_dump_json()
    return {"json": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(sealed: Any) -> TrialRecord | None:
    """The record, or None if it is damaged."""
    try:
        text: str = sealed["json"]
        if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
            return None
        return TrialRecord.model_validate_json(text)
    except (KeyError, TypeError, AttributeError, ValidationError):
        return None


def state_of(record: TrialRecord) -> TrialState:
    """Optuna's state of a trial that ended."""
    return TrialState.COMPLETE if record.status == "finished" else TrialState.FAIL


def values_of(record: TrialRecord) -> list[float] | None:
    """Drop and latency of a successful trial; None of another.

    Raises:
        ConfigError: if one of them is missing or not finite.
    """
    if record.status != "finished":
        return None
    values = [record.drop, record.latency_ms]
    found = [value for value in values if value is not None and math.isfinite(value)]
    if len(found) < len(values):
        raise ConfigError(
            f"trial {record.number}: a finished trial has a finite drop and latency_ms, got {record.drop} and "
            f"{record.latency_ms}; a trial without them has another status"
        )
    return found


def damage(path: Path, study: str) -> str | None:
    """What is wrong with a SQLite file; None if nothing is.

    Raises:
        IntegrityError: if it is in order but holds no search of this name.
        OutputDirectoryError: if it cannot be opened or is locked.
    """
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
            if found != ["ok"]:
                return str(found[0])
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "studies" in tables:
                query = "SELECT 1 FROM studies WHERE study_name = ?"
                if connection.execute(query, (study,)).fetchone() is not None:
                    return None
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if any(name.startswith(other) for other in _ELSEWHERE):
            raise OutputDirectoryError(f"cannot open {path}: {error}; make it readable and writable") from error
        return str(error)
    raise IntegrityError(
        f"{path} holds no search called {study!r}: it is empty or was made by another program; restore a copy of it, "
        "or remove it to start anew"
    )


def read(path: Path, damage: str) -> tuple[dict[str, str], dict[int, TrialRecord]]:
    """Identity, and records by number, from whatever rows of a damaged file can be read.

    Raises:
        IntegrityError: if the identity or every record is lost.
    """
    identity: dict[str, str] | None = None
    records: dict[int, TrialRecord] = {}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        copy = Path(name) / path.name
        for suffix in ("", "-journal"):
            if (part := path.with_name(path.name + suffix)).exists():
                shutil.copyfile(part, copy.with_name(copy.name + suffix))
        with closing(sqlite3.connect(copy)) as connection:
            for value in _rows(connection, "study_user_attributes", IDENTITY, copy.stat().st_size):
                identity = value
            for value in _rows(connection, "trial_user_attributes", RECORD, copy.stat().st_size):
                if (record := unseal(value)) is not None:
                    records[record.number] = record
    if not isinstance(identity, dict) or not records:
        what = "no trial" if isinstance(identity, dict) else "not even what was searched"
        raise IntegrityError(
            f"{path} is damaged ({damage}), and {what} can be read of it; restore a copy of it, or remove it to start "
            "anew"
        )
    return identity, records


def keep(path: Path, damage: str, records: Mapping[int, TrialRecord]) -> None:
    """Puts a copy of the damaged file beside it, and says what was recovered."""
    kept = next(
        place
        for number in range(1, 1_000_000)
        if not (place := path.with_name(f"{path.name}.damaged-{number}")).exists()
    )
    with disk_errors(kept):
        shutil.copyfile(path, kept)
    logger.warning(
        f"{path} is damaged ({damage}): {len(records)} trial(s) up to number {max(records)} were recovered, others "
        f"run again; the damaged file is kept as {kept.name}"
    )


def place(scratch: Path, path: Path) -> None:
    """Moves a whole database to where it belongs."""
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)


def _rows(connection: sqlite3.Connection, table: str, key: str, size: int) -> Iterator[Any]:
    """Values of all attributes of this key, row by row: where a row cannot be read, the next may be."""
    connection.text_factory = bytes
    query = f"SELECT key, value_json FROM {table} WHERE rowid = ?"  # noqa: S608 - our own names
    for number in range(1, size // _SMALLEST_ROW):
        try:
            connection.execute("PRAGMA writable_schema = ON")  # reads on where the file is shorter than it says
            row = connection.execute(query, (number,)).fetchone()
            if row is not None and row[0] == key.encode():
                yield json.loads(row[1])
        except (sqlite3.DatabaseError, ValueError, TypeError):
            continue
