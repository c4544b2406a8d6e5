"""The ledger: which certify split was asked, when, and by which run.

Every look at a split spends some of its power to prove: whoever compresses until a split says yes has proven
nothing. So each use is written down before the answer is known, beside the run directories, where deleting a
run does not delete it, and each further question must be answered more surely than the last: see `level_of`.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from math import nextafter
from pathlib import Path

from tersor.core.files import disk_errors
from tersor.errors import ArtifactError, ConfigError

NAME = "certify-ledger.jsonl"
_KEPT = 0.1  # of the error that is left before a question, what the questions behind it share


def level_of(confidence: float, times_asked: int) -> float:
    """The confidence at which one question to a split is tested, so that `confidence` holds over all of them.

    level = 1 - α_k with α_k = (1 - confidence)·(1 - r)·r^(k-1), r = 0.1, k = `times_asked`. The α_k add up to
    1 - confidence, however often the split is asked, so that is the largest chance of ever certifying wrongly, as
    long as no candidate was made from the split's answers (that others failed may be known). The first question
    keeps nine tenths; each further one must be ten times as sure.

    Args:
        confidence: that is promised over all questions, in (0, 1).
        times_asked: how many runs have asked, this one included; 1 for the first.

    Returns:
        A confidence above `confidence` and below 1.

    Raises:
        ConfigError: `confidence` or `times_asked` is out of range.

    Papers: https://doi.org/10.1002/sim.4780131308 (α spending), https://doi.org/10.1111/j.1467-9868.2007.00643.x
    (α investing; here nothing is earned back)
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, such as 0.95, got {confidence!r}")
    if times_asked < 1:
        raise ConfigError(f"times_asked: expected 1 for the first question, or more, got {times_asked!r}")
    return min(1 - (1 - confidence) * (1 - _KEPT) * _KEPT ** (times_asked - 1), nextafter(1, 0))


def ask(ledger: Path, *, split: str, run: str) -> int:
    """Writes down that `run` asks `split` (both fingerprints) and returns its place among the runs that did, from 1.

    The same run asking again (after a crash, or a copy) gets the same answer from the same data: it keeps its place.

    Raises:
        ArtifactError: if an earlier line cannot be read: then nobody knows how often the split was asked.
    """
    if run not in _runs(ledger, split):
        line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "split": split, "run": run}
        with disk_errors(ledger):
            ledger.parent.mkdir(parents=True, exist_ok=True)
            _append(ledger, json.dumps(line).encode() + b"\n")
    return _runs(ledger, split).index(run) + 1  # read back: two runs that ask at once get two places


def _runs(ledger: Path, split: str) -> list[str]:
    """The runs that asked the split, in order."""
    return list(dict.fromkeys(entry["run"] for entry in read(ledger) if entry["split"] == split))


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
