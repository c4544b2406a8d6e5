"""`tersor bench-kit` and `tersor measure --import`: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tersor
from cli.commands import Command
from tersor.core.artifact import verify
from tersor.pipeline.bench_kit import build_kit

QUICK = ("--rounds", "1", "--seconds", "0.01")


@pytest.fixture(scope="module")
def original(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ONNX Runtime."""
    out = tmp_path_factory.mktemp("original") / "fast"
    with untimed():
        tersor.compress(
            problem.model(),
            problem.small_task(),
            out=out,
            budget=tersor.Budget(max_drop=0.05, rounds=1),
            target=tersor.Target("onnxruntime", threads=1),
            recipe="convert",
        )
    return out


@pytest.fixture(scope="module")
def results(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the kit of that run measured."""
    place = tmp_path_factory.mktemp("bench")
    build_kit([original], place / "kit")
    command = [sys.executable, str(place / "kit" / "bench.py"), *QUICK]
    subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": ""}, check=True, capture_output=True)  # noqa: S603
    return place / "results.json"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "fast"))


def test_a_kit_is_packed(command: Command, original: Path, tmp_path: Path) -> None:
    said = command("bench-kit", original, original / "artifact", "--out", tmp_path / "kit")
    assert said.code == 0, said.err
    assert [line.partition(":")[0] for line in said.out.splitlines()] == ["fast", "fast-2"]
    assert "onnxruntime, float32, 1 threads, batch 1" in said.out
    assert "tersor measure --import" in said.err
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {"bench.py", "kit.json", "README.md", "models"}


def test_json_is_the_kit(command: Command, original: Path, tmp_path: Path) -> None:
    said = command("bench-kit", original, "--out", tmp_path / "kit", "--json")
    assert said.code == 0, said.err
    printed = json.loads(said.out)
    assert printed.pop("out") == str(tmp_path / "kit")
    assert printed == json.loads((tmp_path / "kit" / "kit.json").read_text())


def test_errors_of_packing_have_their_codes(command: Command, original: Path, tmp_path: Path) -> None:
    taken = command("bench-kit", original, "--out", tmp_path)
    assert (taken.code, "already exists" in taken.err) == (4, True)
    nothing = command("bench-kit", tmp_path / "missing", "--out", tmp_path / "kit")
    assert (nothing.code, "is not an artifact" in nothing.err) == (4, True)


def test_results_come_into_the_report(command: Command, run: Path, results: Path) -> None:
    said = command("measure", run, "--import", results)
    assert said.code == 0, said.err
    assert said.out.startswith("imported: ")
    assert "onnxruntime" in said.out
    verify(run / "artifact")
    shown = command("report", run, "--json")
    (place,) = json.loads(shown.out)["elsewhere"]
    assert f"median {place['latency']['median']:.3f} ms" in said.out
    again = command("measure", run, "--import", results, "--json")
    assert again.code == 0
    printed = json.loads(again.out)
    assert printed["imported"] == []
    assert printed["already_there"][0]["latency"]["n"] == place["latency"]["n"]
    assert "histogram" not in printed["already_there"][0]["latency"]


def test_bad_results_end_with_4_and_change_nothing(command: Command, run: Path, results: Path, tmp_path: Path) -> None:
    before = (run / "artifact" / "manifest.json").read_bytes()
    half = tmp_path / "half.json"
    half.write_bytes(results.read_bytes()[:-100])
    said = command("measure", run, "--import", half)
    assert (said.code, said.out) == (4, "")
    assert "IntegrityError" in said.err
    assert (run / "artifact" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("option", ["--threads", "--rounds", "--batch"])
def test_settings_of_a_measurement_here_are_refused(command: Command, run: Path, results: Path, option: str) -> None:
    said = command("measure", run, "--import", results, option, 3)
    assert said.code == 2
    assert f"so {option} cannot be set here" in said.err


def test_without_import_it_measures_here(command: Command, run: Path) -> None:
    said = command("measure", run, "--rounds", 1, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["latency_ms"]["n"] >= 5
    assert "elsewhere" not in (run / "artifact" / "report.html").read_text()
