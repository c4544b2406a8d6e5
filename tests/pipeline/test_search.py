"""Searches from one call to a certified artifact, on real runtimes, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tersor.core.report import Report
from tersor.errors import ConfigError, DataError, OutputDirectoryError, SplitTooSmallError
from tersor.measure.ladder import reachable
from tersor.measure.ledger import NAME, ask, level_of, read
from tersor.recipes.load import parse_recipe
from tersor.search import Search

TARGET = tersor.Target("onnxruntime", threads=1)
FORMATS = Search(kinds=(), formats=("float32", "int8"), minutes=5)


def task_of(problem: Any, **fields: Any) -> tersor.Task:
    x, y = problem.images()
    parts = {
        "train": slice(0, 400),
        "search": slice(400, 600),
        "certify": slice(600, 1400),
        "report": slice(1400, 1600),
    }
    return tersor.Task(**({role: (x[part], y[part]) for role, part in parts.items()} | fields))


def budget(**fields: Any) -> tersor.Budget:
    return tersor.Budget(**{"max_drop": 0.03, "rounds": 1, **fields})


@pytest.fixture(scope="module")
def compared(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> tersor.Result:
    """Number formats alone: the quickest search that there is."""
    out = tmp_path_factory.mktemp("formats") / "run"
    with untimed():
        return tersor.compress(
            problem.model(), task_of(problem), out=out, budget=budget(), target=TARGET, recipe=FORMATS
        )


def test_the_fastest_format_that_is_certified_is_deployed(compared: tersor.Result) -> None:
    record = compared.report.search
    assert record is not None
    assert [(trial.choice.format, trial.status, trial.source) for trial in record.trials] == [
        ("float32", "finished", "preset"),
        ("int8", "finished", "preset"),
    ]
    assert record.ladder is not None
    assert record.ladder.spent == pytest.approx(0.955)
    passed = [step for step in record.ladder.steps if step.certified]
    assert record.chosen == min(passed, key=lambda step: step.latency_ms).trial
    assert compared.certified
    chosen = record.trials[record.chosen]
    assert parse_recipe(json.dumps(chosen.recipe)).steps == parse_recipe(json.dumps(compared.report.recipe)).steps
    assert "nothing of this model can be cut" in " ".join(record.notes)


def test_what_was_certified_is_what_is_deployed(compared: tersor.Result) -> None:
    record = compared.report.search
    assert record is not None
    choice = record.trials[record.chosen or 0].choice
    run = compared.artifact.parent
    tried = run / "search" / "trials" / f"{choice.key}-0" / "exported" / "model.onnx"
    assert tried.read_bytes() == (compared.artifact / "model.onnx").read_bytes()
    assert tersor.load(run)(torch.randn(4, 1, 8, 8)).shape == (4, 4)


def test_a_search_asks_the_certify_split_once_and_resumes_without_trials(problem: Any, compared: tersor.Result) -> None:
    run = compared.artifact.parent
    assert len(read(run.parent / NAME)) == 1
    before = (run / "artifact" / "report.json").read_bytes()
    again = tersor.compress(problem.model(), task_of(problem), out=run, budget=budget(), target=TARGET, recipe=FORMATS)
    assert (run / "artifact" / "report.json").read_bytes() == before
    assert again.report == compared.report
    assert len(read(run.parent / NAME)) == 1


def test_what_is_aimed_at_stays_although_the_ledger_has_grown(problem: Any, compared: tersor.Result) -> None:
    run = compared.artifact.parent
    kept = json.loads((run / "search" / "aim.json").read_text())
    ledger = run.parent / NAME
    split = read(ledger)[0]["split"]
    before = ledger.read_bytes()
    ask(ledger, split=split, run="another")
    try:
        tersor.compress(problem.model(), task_of(problem), out=run, budget=budget(), target=TARGET, recipe=FORMATS)
        assert json.loads((run / "search" / "aim.json").read_text()) == kept
        assert [entry["run"] for entry in read(ledger)][1:] == ["another"]  # the same question: asked no third time
    finally:
        ledger.write_bytes(before)
    assert kept == pytest.approx(reachable(800, 0.03, confidence=level_of(0.95, 1)))


@pytest.mark.parametrize(
    ("fields", "settings", "differs"),
    [({"seed": 1}, FORMATS, "seed"), ({}, FORMATS.model_copy(update={"minutes": 6.0}), "recipe")],
)
def test_another_search_on_the_directory_is_refused(
    problem: Any, compared: tersor.Result, fields: dict[str, Any], settings: Search, differs: str
) -> None:
    with pytest.raises(OutputDirectoryError, match=rf"its {differs} differ"):
        tersor.compress(
            problem.model(),
            task_of(problem),
            out=compared.artifact.parent,
            budget=budget(),
            target=TARGET,
            recipe=settings,
            **fields,
        )


@pytest.mark.parametrize(
    ("limits", "splits", "error", "message"),
    [
        ({"max_drop": None}, {}, ConfigError, "a search needs Budget"),
        ({"minimise": "size"}, {}, ConfigError, "a search minimises latency"),
        ({}, {"search": None}, DataError, "a search needs a 'search' split"),
        ({}, {"train": None}, DataError, "a search needs a 'train' split"),
        ({"max_drop": 0.003}, {}, SplitTooSmallError, "at least"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_work(
    problem: Any,
    tmp_path: Path,
    limits: dict[str, Any],
    splits: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        tersor.compress(
            problem.model(),
            task_of(problem, **splits),
            out=tmp_path / "run",
            budget=budget(minutes=1.0, **limits),
            target=TARGET,
        )
    assert not (tmp_path / "run").exists()


def test_minutes_belong_to_a_search(problem: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Budget\.minutes is for"):
        tersor.compress(
            problem.model(), task_of(problem), out=tmp_path / "run", budget=budget(minutes=1.0), recipe="int8"
        )


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import tersor, problem
from tersor.search import Search
from tersor.train import Schedule

x, y = problem.images()
parts = {{"train": slice(0, 400), "search": slice(400, 600), "certify": slice(600, 1400), "report": slice(1400, 1600)}}
task = tersor.Task(**{{role: (x[part], y[part]) for role, part in parts.items()}})
tersor.compress(
    problem.trained(), task, out={out!r}, budget=tersor.Budget(max_drop=0.03, rounds=1),
    target=tersor.Target("onnxruntime", threads=1),
    recipe=Search(minutes=10, trials=2, refine=0, finalists=1, points=4, schedule=Schedule(lr=0.01, batch_size=64)),
)
"""


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_ends_as_one_that_is_not(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed" / "run"
    paths = [str(problem.directory), *sys.path]
    environment = {**os.environ, "TERSOR_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", SCRIPT.format(paths=paths, out=str(out))]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)  # noqa: S603
    started = time.monotonic()
    while not list(out.glob("search/trials/*-0/exported")) and time.monotonic() - started < 300:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)  # noqa: S603
    assert done.returncode == 0, done.stderr
    report = Report.model_validate_json((out / "artifact" / "report.json").read_text())
    record = report.search
    assert record is not None
    pairs = [(trial.choice.key, trial.rung) for trial in record.trials]
    assert len(pairs) == len(set(pairs))
    assert {trial.rung for trial in record.trials} >= {0, 1}
    assert record.costs
    assert record.damages is not None
    assert record.chosen is not None
    trained = [trial for trial in record.trials if trial.choice.widths or trial.choice.skipped]
    assert trained
    assert all(trial.predicted_ms is not None for trial in trained)


@pytest.mark.slow
def test_slices_of_one_super_network_are_searched(
    problem: Any, untimed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    with untimed():
        result = tersor.compress(
            problem.model(),
            task_of(problem),
            out=tmp_path / "run",
            budget=budget(),
            target=TARGET,
            recipe=Search(minutes=10, strategy="once-for-all", trials=2, refine=0, finalists=1, points=4),
        )
    record = result.report.search
    assert record is not None
    sliced = [trial for trial in record.trials if trial.choice.widths and trial.status == "finished"]
    assert sliced
    steps = sliced[0].recipe["steps"]
    assert isinstance(steps, list)
    assert [next(iter(step)) for step in steps[:2]] == ["distill.once_for_all", "prune.structured"]
    assert steps[1]["prune.structured"]["criterion"] == "order"
    trained = list((tmp_path / "run/search/trials/foundation/stages").iterdir())
    assert [path.name for path in trained] == ["01.safetensors"]
