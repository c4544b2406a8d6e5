"""A killed run goes on and ends like one that was never killed; another run is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.core.artifact import verify
from tersor.distill import Recover
from tersor.errors import IntegrityError, OutputDirectoryError
from tersor.pipeline.run_directory import RUN
from tersor.prune import Unstructured
from tersor.train import Schedule

pytestmark = pytest.mark.usefixtures("quick_latency")

BUDGET = tersor.Budget(max_drop=0.05, rounds=1)
EAGER = tersor.Target("eager", threads=1)
RECIPE = tersor.Recipe([Unstructured(sparsity=0.5), Recover(schedule=Schedule(epochs=1, lr=0.01))])

# A run in a process of its own, which says where it is. Without `--timed` its latencies are invented.
CHILD = """
import logging, sys
sys.path.insert(0, sys.argv[1])
import problem, tersor
if "--timed" not in sys.argv:
    sys.path.insert(0, sys.argv[3])
    import conftest, tersor.pipeline.measuring
    tersor.pipeline.measuring.latency = conftest.in_this_process
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
print("begin", flush=True)
task = problem.task(preprocessing="noise over a pattern")
result = tersor.compress(problem.trained(), task, out=sys.argv[2], budget=tersor.Budget(max_drop=0.02, rounds=1),
                         target=tersor.Target("onnxruntime", threads=1), recipe="prune-recover-int8")
print("end", result.certified, flush=True)
"""


def run(problem: Any, out: Path, **changed: Any) -> tersor.Result:
    """The short run of this file, with some arguments changed."""
    arguments = {"budget": BUDGET, "target": EAGER, "recipe": RECIPE, "out": out}
    model, task = changed.pop("model", None) or problem.model(), changed.pop("task", None) or problem.small_task()
    return tersor.compress(model, task, **(arguments | changed))


def start(problem: Any, out: Path, *options: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", CHILD, str(problem.directory), str(out), tests, *options]
    scratch = out.with_name("scratch")  # what a killed process leaves in its temporary directory
    scratch.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(scratch)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)  # noqa: S603


def killed_after(problem: Any, out: Path, seconds: float, *options: str) -> bool:
    """Starts the run, kills it `seconds` after it began; says whether it was still at work."""
    with start(problem, out, *options) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begin\n"
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
    return child.returncode == -signal.SIGKILL


def killed_at(problem: Any, out: Path, word: str) -> None:
    """Starts the run and kills it as soon as it says `word`."""
    with start(problem, out) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if word in line:
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL


def files_of(artifact: Path) -> dict[str, bytes]:
    """What must be the same bits: the model, and the plan that it was lowered from."""
    return {name: (artifact / name).read_bytes() for name in ("model.onnx", "quantization.json")}


def ledger(directory: Path) -> list[dict[str, str]]:
    lines = (directory / "certify-ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_finished(out: Path, expected: tersor.Result) -> None:
    """The run ended like an undisturbed one, and asked its question once."""
    assert files_of(out / "artifact") == files_of(expected.artifact)
    verify(out / "artifact")
    report = tersor.Report.model_validate_json((out / "artifact" / "report.json").read_text())
    assert report.certificate == expected.report.certificate
    assert report.certificate is not None
    assert report.certificate.times_asked == 1
    assert [record.name for record in report.history] == ["prune.structured", "recover", "quantize.static"]
    assert len(ledger(out.parent)) == 1
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {RUN, "stages", "artifact"}


# --- killed


def test_a_run_that_is_killed_again_and_again_ends_the_same(problem: Any, deployed: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed_at(problem, out, "step 2 of 3")
    assert (out / "stages" / "01.safetensors").exists()
    assert not (out / "artifact").exists()
    killed_at(problem, out, "evaluate certify: original")  # the ledger knows of it, the artifact is half written
    assert len(ledger(tmp_path)) == 1
    assert not (out / "artifact").exists()
    assert [path for path in out.iterdir() if path.name.startswith(".artifact.")]
    with start(problem, out) as child:
        said = child.communicate()[0]
    assert child.returncode == 0
    assert "end True" in said
    assert "step 1 of 3" not in said  # finished steps were taken up
    assert "step 2 of 3" not in said
    check_finished(out, deployed("onnxruntime", "prune-recover-int8"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killing_at_any_moment_is_survived(problem: Any, deployed: Any, tmp_path: Path, seed: int) -> None:
    generator, out, kills = random.Random(seed), tmp_path / "run", 0  # noqa: S311 - moments, not secrets
    for _ in range(5):
        if not killed_after(problem, out, generator.uniform(0, 8), "--timed"):
            break
        kills += 1
        if (out / "artifact").exists():
            verify(out / "artifact")
    with start(problem, out, "--timed") as child:
        said = child.communicate()[0]
    assert child.returncode == 0, said
    assert kills > 0
    check_finished(out, deployed("onnxruntime", "prune-recover-int8"))


@pytest.mark.parametrize("moment", ["nothing", "directory", "scratch of run.json", "run.json"])
def test_being_killed_while_taking_the_directory_is_survived(problem: Any, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    if moment != "nothing":
        out.mkdir()
    if moment == "scratch of run.json":
        (out / f".{RUN}.ab12cd").write_text('{"finger')
    if moment == "run.json":
        whole = run(problem, tmp_path / "whole")
        shutil.copy(whole.artifact.parent / RUN, out / RUN)
    assert run(problem, out).certified


@pytest.mark.parametrize("leftover", [".artifact.x1y2z3/model.safetensors", "stages/.02.safetensors.a1b2"])
def test_leftovers_of_a_killed_run_do_not_matter(problem: Any, tmp_path: Path, leftover: str) -> None:
    expected = run(problem, tmp_path / "expected")
    out = tmp_path / "run"
    (out / leftover).parent.mkdir(parents=True)
    (out / leftover).write_bytes(b"half")
    shutil.copy(tmp_path / "expected" / RUN, out / RUN)
    result = run(problem, out)
    name = "model.safetensors"
    assert (result.artifact / name).read_bytes() == (expected.artifact / name).read_bytes()
    assert {path.name for path in result.artifact.iterdir()} == {path.name for path in expected.artifact.iterdir()}


@pytest.mark.parametrize("stages", [1, 2])
def test_finished_steps_are_taken_up(
    problem: Any, tmp_path: Path, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(problem, tmp_path / "whole")
    out = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", out)
    shutil.rmtree(out / "artifact")
    for path in sorted((out / "stages").iterdir())[stages:]:
        path.unlink()
    applied = []
    for step in (Unstructured, Recover):
        monkeypatch.setattr(step, "apply", counting(step.apply, applied))
    again = run(problem, out)
    assert len(applied) == 2 - stages
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    name = "model.safetensors"
    assert (again.artifact / name).read_bytes() == (whole.artifact / name).read_bytes()
    assert again.report.history[:stages] == whole.report.history[:stages]
    assert again.report.coverage == whole.report.coverage
    assert again.report.certificate == whole.report.certificate


def counting(method: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counted(step: Any, *args: Any) -> Any:
        calls.append(step.name)
        return method(step, *args)

    return counted


# --- damage


def resume_with(problem: Any, tmp_path: Path, damage: Callable[[Path], object]) -> tersor.Result:
    """A run whose second stage was damaged before it could be taken up."""
    run(problem, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifact")
    damage(tmp_path / "run" / "stages" / "02.safetensors")
    return run(problem, tmp_path / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def other_weights(path: Path) -> None:
    save_file({"state:weight": torch.zeros(2)}, path, metadata={"history": "[]"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: save_file(load_file(path), path),
        other_weights,
        flip,
    ],
    ids=["truncated", "empty", "rubbish", "no history", "other weights", "one bit"],
)
def test_a_damaged_stage_is_named_and_can_be_repeated(problem: Any, tmp_path: Path, damage: Any) -> None:
    with pytest.raises(IntegrityError, match=r"02.safetensors is damaged .*remove it to repeat this step"):
        resume_with(problem, tmp_path, damage)
    assert not (tmp_path / "run" / "artifact").exists()
    (tmp_path / "run" / "stages" / "02.safetensors").unlink()
    assert run(problem, tmp_path / "run").certified


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": 3}', "null", "\x00"])
def test_a_damaged_run_file_is_named(problem: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN).write_text(content)
    with pytest.raises(OutputDirectoryError, match=r"run\.json is damaged; remove"):
        run(problem, tmp_path / "run")
    assert (tmp_path / "run" / RUN).read_text() == content


# --- another run


def changed_model(problem: Any) -> nn.Module:
    model: nn.Module = problem.model()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-6
    return model


def changed_task(problem: Any, role: str) -> tersor.Task:
    splits = problem.small_splits()
    x, y = splits[role]
    x = x.clone()
    x[0, 0, 0, 0] += 1e-3
    task: tersor.Task = problem.small_task(**{role: (x, y)})
    return task


def relabelled_task(problem: Any, role: str) -> tersor.Task:
    x, y = problem.small_splits()[role]
    y = y.clone()
    y[0] = (y[0] + 1) % 4
    task: tersor.Task = problem.small_task(**{role: (x, y)})
    return task


CHANGES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "model": ("model", lambda problem: {"model": changed_model(problem)}),
    "seed": ("seed", lambda problem: {"seed": 1}),
    "recipe": ("recipe", lambda problem: {"recipe": tersor.Recipe([Unstructured(sparsity=0.4)])}),
    "step settings": ("recipe", lambda problem: {"recipe": tersor.Recipe([RECIPE.steps[0], Recover(losses="kd")])}),
    "budget": ("budget", lambda problem: {"budget": BUDGET.model_copy(update={"max_drop": 0.06})}),
    "target": ("target", lambda problem: {"target": tersor.Target("eager", threads=1, batch=2)}),
    "metric": ("task", lambda problem: {"task": problem.small_task(metric="f1")}),
    "train images": ("task", lambda problem: {"task": changed_task(problem, "train")}),
    "certify images": ("task", lambda problem: {"task": changed_task(problem, "certify")}),
    "certify labels": ("task", lambda problem: {"task": relabelled_task(problem, "certify")}),
    "train labels": ("task", lambda problem: {"task": relabelled_task(problem, "train")}),
    "class names": ("task", lambda problem: {"task": problem.small_task(class_names=("w", "x", "y", "z"))}),
    "preprocessing": ("task", lambda problem: {"task": problem.small_task(preprocessing="another")}),
}


@pytest.fixture(scope="module")
def finished(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test may change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with untimed():
        run(problem, out)
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_another_call_on_the_same_directory_is_refused(problem: Any, finished: Path, change: str) -> None:
    part, arguments = CHANGES[change]
    before = {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")}
    with pytest.raises(OutputDirectoryError, match=rf"holds another run: its {part} differ\(s\)") as caught:
        run(problem, finished, **arguments(problem))
    assert str(finished) in str(caught.value)
    assert "choose another directory" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")} == before


def test_everything_that_differs_is_named(problem: Any, finished: Path) -> None:
    with pytest.raises(OutputDirectoryError, match=r"its model, recipe, seed differ"):
        run(problem, finished, model=changed_model(problem), seed=3, recipe=tersor.Recipe([Unstructured(sparsity=0.4)]))


def test_an_equal_call_is_the_same_run(problem: Any, finished: Path) -> None:
    shuffled = {
        "report": problem.small_splits()["report"]
    } | problem.small_splits()  # splits in another order of keywords
    result = run(problem, finished, task=tersor.Task(**shuffled, class_names=("a", "b", "c", "d")))
    assert result.certified
    assert len(ledger(finished.parent)) == 1


# --- what is no run


@pytest.mark.parametrize("what", ["file", "hidden file", "directory", "old artifact"])
def test_a_directory_with_something_else_in_it_is_refused(
    problem: Any, finished: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    if what == "directory":
        (out / "photos").mkdir()
    elif what == "old artifact":
        shutil.copytree(finished / "artifact", out / "artifact")
    else:
        (out / ("thesis.tex" if what == "file" else ".git")).write_text("precious")
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputDirectoryError, match=r"not empty and not a run of tersor; choose a new or empty"):
        run(problem, out)
    assert sorted(out.rglob("*")) == before


def test_an_empty_directory_is_welcome(problem: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(problem, tmp_path / "empty").certified


def test_a_file_in_place_of_the_directory_is_refused(problem: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputDirectoryError):
            run(problem, out)
    assert (tmp_path / "file").read_text() == "precious"
