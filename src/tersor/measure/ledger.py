"""The ledger: which certify split was asked, when, and by which run.

Every look at a split spends some of its power to prove: whoever compresses until a split says yes has proven
nothing. So each use is written down before the answer is known, beside the run directories, where deleting a
run does not delete it.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from tersor.core.files import disk_errors
from tersor.errors import ArtifactError

NAME = "certify-ledger.jsonl"


def ask(ledger: Path, *, split: str, run: str) -> int:
    """Writes down that `run` asks `split` (both fingerprints) and returns how many runs have asked it.

    The same run asking again (after a crash) gets the same answer from the same data and counts once.

    Raises:
        ArtifactError: if an earlier line cannot be read: then nobody knows how often the split was asked.
    """
    entries = read(ledger)
    runs = {entry["run"] for entry in entries if entry["split"] == split}
    if run not in runs:
        line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "split": split, "run": run}
        with disk_errors(ledger):
            ledger.parent.mkdir(parents=True, exist_ok=True)
            _append(ledger, json.dumps(line).encode() + b"\n")
    return len(runs | {run})


def _append(ledger: Path, line: bytes) -> None:
    """Adds a whole line or nothing: half of one would make the ledger unreadable for good."""
    with ledger.open("ab", buffering=0) as stream:
        size = stream.tell()
        if size and not ledger.read_bytes().endswith(b"\n"):
            line = b"\n" + line
        if stream.write(line) < len(line):
            stream.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(stream.fileno())


def read(ledger: Path) -> list[dict[str, str]]:
    """All entries."""
    if not ledger.exists():
        return []
    entries = []
    for number, line in enumerate(ledger.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append({key: str(entry[key]) for key in ("date", "split", "run")})
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(
                f"{ledger}, line {number} is not a ledger entry; without it nobody knows how often a certify split "
                "was asked. Restore the file, or start with fresh certify data and a new directory"
            ) from None
    return entries
