"""The ledger: distinct runs per split, written before the answer is known, never guessed at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tersor.errors import ArtifactError, OutputDirectoryError
from tersor.measure.ledger import NAME, ask, read


def test_it_counts_distinct_runs_of_each_split(tmp_path: Path) -> None:
    ledger = tmp_path / "runs" / NAME
    asked = [ask(ledger, split=split, run=run) for split, run in ["sa", "sb", "ta", "sc", "ub"]]
    assert asked == [1, 2, 1, 3, 1]
    assert [(entry["split"], entry["run"]) for entry in read(ledger)] == [tuple(pair) for pair in
                                                                         ["sa", "sb", "ta", "sc", "ub"]]  # fmt: skip


def test_the_same_run_counts_once(tmp_path: Path) -> None:
    ledger = tmp_path / NAME
    assert [ask(ledger, split="s", run="a") for _ in range(3)] == [1, 1, 1]
    assert ask(ledger, split="s", run="b") == 2
    assert ask(ledger, split="s", run="a") == 2
    assert len(ledger.read_text().splitlines()) == 2


def test_entries_are_one_json_line_each_with_a_date(tmp_path: Path) -> None:
    ledger = tmp_path / NAME
    ask(ledger, split="s", run="a")
    (line,) = ledger.read_text().splitlines()
    entry = json.loads(line)
    assert set(entry) == {"date", "split", "run"}
    assert abs(datetime.fromisoformat(entry["date"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path / NAME) == []


@pytest.mark.parametrize(
    "damage",
    [b"{", b"null\n", b"[1, 2]\n", b'{"split": "s"}\n', b"\n", b'{"date": 1, "split": "s", "ru', b"\xff\xfe\x00\n",
     b'{"date": "d", "split": "s", "run": "r"}{"date": "d", "split": "s", "run": "q"}\n'],
    ids=["cut", "null", "list", "keys missing", "blank", "torn", "binary", "two on a line"],
)  # fmt: skip
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    ledger = tmp_path / NAME
    ask(ledger, split="s", run="a")
    ledger.write_bytes(ledger.read_bytes() + damage)
    before = ledger.read_bytes()
    with pytest.raises(ArtifactError, match=r"line 2 .*fresh certify data") as caught:
        ask(ledger, split="s", run="b")
    assert str(ledger) in str(caught.value)
    assert ledger.read_bytes() == before


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    ledger = tmp_path / NAME
    ask(ledger, split="s", run="a")
    ledger.write_text(ledger.read_text().rstrip("\n"))  # as some editors leave it
    assert ask(ledger, split="s", run="b") == 2
    assert ask(ledger, split="s", run="c") == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputDirectoryError, match="cannot write") as caught:
        ask(tmp_path / "file" / NAME, split="s", run="a")
    assert NAME in str(caught.value)


def test_a_full_disk_leaves_the_ledger_whole(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(8)
    ledger = disk / NAME

    def fill() -> None:
        for number in range(1000):
            ask(ledger, split="s", run=f"{number:032d}")

    with pytest.raises(OutputDirectoryError, match="No space left"):
        fill()
    written = len(read(ledger))
    assert 10 < written < 200
    assert ledger.read_bytes().endswith(b"\n")
    small_disk(64)
    assert ask(ledger, split="s", run="one more") == written + 1


@pytest.mark.skipif(not hasattr(os, "fsync"), reason="no fsync here")
def test_it_is_on_the_disk_before_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    ask(tmp_path / NAME, split="s", run="a")
    assert NAME in flushed
