"""The ledger: distinct runs per split, written before the answer is known, never guessed at; what they spend."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import ArtifactError, ConfigError, OutputDirectoryError
from tersor.measure import exact_paired
from tersor.measure.ledger import NAME, ask, level_of, read


def test_it_counts_distinct_runs_of_each_split(tmp_path: Path) -> None:
    ledger = tmp_path / "runs" / NAME
    asked = [ask(ledger, split=split, run=run) for split, run in ["sa", "sb", "ta", "sc", "ub"]]
    assert asked == [1, 2, 1, 3, 1]
    assert [(entry["split"], entry["run"]) for entry in read(ledger)] == [tuple(pair) for pair in
                                                                         ["sa", "sb", "ta", "sc", "ub"]]  # fmt: skip


def test_the_same_run_keeps_its_place(tmp_path: Path) -> None:
    ledger = tmp_path / NAME
    assert [ask(ledger, split="s", run="a") for _ in range(3)] == [1, 1, 1]
    assert ask(ledger, split="s", run="b") == 2
    assert ask(ledger, split="s", run="a") == 1
    assert len(ledger.read_text().splitlines()) == 2


def test_a_run_that_asks_at_the_same_time_takes_the_place_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / NAME
    real = os.fsync
    others = ["b"]

    def slow(descriptor: int) -> None:
        real(descriptor)
        if others:  # its line is written, its place not read yet
            assert ask(ledger, split="s", run=others.pop()) == 2

    monkeypatch.setattr(os, "fsync", slow)
    assert ask(ledger, split="s", run="a") == 1


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


# --- spending


@given(st.floats(1e-3, 1 - 1e-6), st.integers(1, 40))
def test_all_questions_together_spend_no_more_than_was_promised(confidence: float, asked: int) -> None:
    levels = [level_of(confidence, number) for number in range(1, asked + 1)]
    assert all(confidence < level < 1 for level in levels)
    assert levels == sorted(levels)
    assert sum(1 - level for level in levels) <= (1 - confidence) * (1 + 1e-9) + asked * 2**-52


def test_the_first_question_keeps_nine_tenths() -> None:
    levels = [level_of(0.95, number) for number in (1, 2, 3)]
    assert levels == pytest.approx([0.955, 0.9955, 0.99955], abs=1e-12)
    assert 0.999999 < level_of(0.95, 10_000) < 1


@pytest.mark.parametrize(("confidence", "asked"), [(0.0, 1), (1.0, 1), (float("nan"), 1), (0.95, 0)])
def test_what_cannot_be_spent(confidence: float, asked: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        level_of(confidence, asked)


def test_asking_until_it_passes_fails() -> None:
    """20 runs ask about the same kind of bad candidate, each on a question of its own: as independent as can be."""
    n, rate, splits = 400, 0.02, 4000  # the drop is the budget; all flips are losses
    losses = np.random.default_rng(0).binomial(n, rate, size=(splits, 20))
    spending, naive = np.zeros(splits, bool), np.zeros(splits, bool)
    for number in range(20):
        most, fixed = (
            max((b for b in range(9) if exact_paired.p_value(b, 0, n, rate, level) <= 1 - level), default=-1)
            for level in (level_of(0.95, number + 1), 0.95)
        )
        spending |= losses[:, number] <= most
        naive |= losses[:, number] <= fixed
    assert spending.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / splits)
    assert naive.mean() > 0.3
