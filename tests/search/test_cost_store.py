"""The store of measured points: nothing is measured twice, nothing that was measured is lost, damage is noticed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.search import cost_store
from tersor.search.cost_store import CHUNK, fingerprint, load, measure_table, save
from tersor.search.costs import Point, design
from tersor.search.space import Group, Space, Weight

BLOCKS = [f"b{index}" for index in range(5)]
SPACE = Space(
    (*(Group(name, "block", (1, 0)) for name in BLOCKS), Group("f", "channel", (16, 8, 4))),
    (
        Weight("stem.weight", "stem", 1000, 10, 100, rows=(("f", 1.0),)),
        *(Weight(f"{name}.weight", "inner", 5000, 20, 200, name, columns=(("f", 1.0),)) for name in BLOCKS),
    ),
    ("float32", "int8"),
)


class Machine:
    """Takes a thousandth of a millisecond for each multiply-accumulate, and remembers what it was asked."""

    def __init__(self, *, fails_after: int = 1000) -> None:
        self.asked: list[Choice] = []
        self.fails_after = fails_after

    def __call__(self, choices: Sequence[Choice]) -> list[Point]:
        if len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked += choices
        return [
            Point(choice, 0.1 + SPACE.macs(choice) / 1000, round(10 + SPACE.entries(choice)), round(SPACE.macs(choice)))
            for choice in choices
        ]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


def test_points_come_back_as_they_were(cache: Path) -> None:
    points = [
        Point(Choice(skipped=("b1",), widths={"f": 4}, format="int8"), 0.1 + 0.2, 10, 20, 30),
        Point(Choice(), 1.0, 10, 20),
    ]
    assert load("abc1") == []
    save("abc1", points)
    assert load("abc1") == points
    assert [path.name for path in cache.iterdir()] == ["abc1.json"]
    save("abc1", points[:1])
    assert load("abc1") == points[:1]


def test_nothing_is_measured_twice() -> None:
    first, second = Machine(), Machine()
    table = measure_table(SPACE, "float32", first, fingerprint="abc", points=10)
    assert first.asked == design(SPACE, "float32", points=10)
    assert measure_table(SPACE, "float32", second, fingerprint="abc", points=10) == table
    assert second.asked == []
    assert table.predict_ms(Choice()) == pytest.approx(0.1 + SPACE.macs(Choice()) / 1000, rel=0.01)
    wider = measure_table(SPACE, "float32", second, fingerprint="abc", points=14)
    assert second.asked == design(SPACE, "float32", points=14)[10:]
    assert wider.points[:10] == table.points
    measure_table(SPACE, "float32", third := Machine(), fingerprint="def", points=10)
    assert len(third.asked) == 10


def test_without_a_fingerprint_nothing_is_kept(cache: Path) -> None:
    for _ in range(2):
        measure_table(SPACE, "float32", machine := Machine(), fingerprint=None, points=6)
        assert len(machine.asked) == 6
    assert not cache.exists()


def test_an_interrupted_measuring_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        measure_table(SPACE, "float32", first := Machine(fails_after=2 * CHUNK), fingerprint="abc", points=14)
    assert len(load("abc")) == len(first.asked) == 2 * CHUNK
    table = measure_table(SPACE, "float32", second := Machine(), fingerprint="abc", points=14)
    assert [*first.asked, *second.asked] == design(SPACE, "float32", points=14)
    assert len(table.points) == 14


def test_what_cannot_be_built_is_left_out() -> None:
    def measure(choices: Sequence[Choice]) -> list[Point]:
        return Machine()([choice for choice in choices if not choice.widths])

    wanted = design(SPACE, "float32", points=12)
    table = measure_table(SPACE, "float32", measure, fingerprint="abc", points=12)
    assert [point.choice for point in table.points] == [choice for choice in wanted if not choice.widths]
    assert len(table.points) < 12
    with pytest.raises(ConfigError, match="at least 3"):
        measure_table(SPACE, "float32", lambda choices: [], fingerprint="def", points=12)


def test_answers_that_nobody_asked_for_are_refused() -> None:
    stranger = Point(Choice(skipped=("b4", "b3"), widths={"f": 16}), 1.0, 1, 1)
    with pytest.raises(ConfigError, match="others"):
        measure_table(SPACE, "float32", lambda choices: [stranger], fingerprint="abc", points=12)
    assert load("abc") == []


@pytest.mark.parametrize("damage", ["half", "not json", "wrong type", "impossible", "empty"])
def test_a_damaged_file_is_moved_aside_and_measured_again(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    table = measure_table(SPACE, "float32", Machine(), fingerprint="abc", points=6)
    file = cache / "abc.json"
    text = file.read_text()
    file.write_text(
        {
            "half": text[: len(text) // 2],
            "not json": "\0" * 50,
            "wrong type": text.replace('"size_bytes":', '"size_bytes":"many", "old":', 1),
            "impossible": text.replace('"latency_ms":', '"latency_ms":NaN, "old":', 1),
            "empty": "",
        }[damage]
    )
    bad = file.read_text()
    with caplog.at_level(logging.WARNING, "tersor"):
        again = measure_table(SPACE, "float32", machine := Machine(), fingerprint="abc", points=6)
    assert len(machine.asked) == 6
    assert again == table
    assert "is damaged" in caplog.text
    assert (cache / "abc.damaged").read_text() == bad
    assert file.read_text() == text


def test_a_place_that_cannot_be_written_costs_only_the_memory(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_text("a file where a directory should be")
    with caplog.at_level(logging.WARNING, "tersor"):
        table = measure_table(SPACE, "float32", Machine(), fingerprint="abc", points=6)
    assert len(table.points) == 6
    assert "are not kept" in caplog.text


def test_the_fingerprint_knows_everything_that_a_latency_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"runtime": "onnxruntime", "version": "1.22", "threads": 2, "batch": 1}
    other_space = Space(SPACE.groups[1:], SPACE.weights, SPACE.formats)
    found = [
        fingerprint(SPACE, "float32", **facts),
        fingerprint(SPACE, "int8", **facts),
        fingerprint(other_space, "float32", **facts),
        *(
            fingerprint(SPACE, "float32", **facts | {name: value})
            for name, value in {"runtime": "openvino", "version": "1.23", "threads": 1, "batch": 8}.items()
        ),
    ]
    assert fingerprint(SPACE, "float32", **facts) == found[0]
    for name, value in (("cpu_name", "another"), ("cpu_flags", frozenset({"avx2"}))):
        with monkeypatch.context() as patch:
            patch.setattr(f"tersor.core.machine.{name}", lambda value=value: value)
            found.append(fingerprint(SPACE, "float32", **facts))
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    found.append(fingerprint(SPACE, "float32", **facts))
    assert len(set(found)) == len(found) == 10
    save(found[0], [])  # they are file names


def test_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost_store.directory() == tmp_path / "cache" / "costs"
    monkeypatch.delenv("TERSOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cost_store.directory() == tmp_path / "xdg" / "tersor" / "costs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cost_store.directory() == tmp_path / "home" / ".cache" / "tersor" / "costs"
    with pytest.raises(ConfigError, match="letters and digits"):
        load("../abc")
