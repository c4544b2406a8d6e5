"""`tersor distill`: students by reference, by layers and by width; what it writes, and how it fails."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tersor
from cli.commands import Command, Said
from tersor.core.artifact import parse_surgeries

LESSON = """
import tersor, torch
from torch import nn
import problem


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        print("forward")
        return x + self.conv(x).relu()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def deep():
    torch.manual_seed(0)
    return Deep()


def student():  # its weights are drawn anew at every call
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def number():
    return 5


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def task(**fields):
    x, y = problem.images()
    return problem.small_task(search=(x[1000:1100], y[1000:1100]), **fields)


def sure():
    return task(metric="perplexity")


def silent():
    x, _ = problem.images()
    return tersor.Task(train=x[:100], certify=x[600:700], search=x[1000:1100])
"""
QUICK = ("--schedule", "{batch_size: 50, lr: 0.05}")


@pytest.fixture
def lesson(in_problem: None, problem: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `lesson` beside the problem's."""
    (problem.directory / "lesson.py").write_text(LESSON)
    monkeypatch.syspath_prepend(problem.directory)
    return importlib.import_module("lesson")


@pytest.fixture
def distill(command: Command, lesson: Any) -> Command:
    """`tersor distill …` in the directory of the problem's module, of its trained network."""

    def run(*options: object, model: str = "problem:trained", task: str = "lesson:task") -> Said:
        return command("distill", "--model", model, "--task", task, *QUICK, *options)

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "student" / "weights.safetensors")


def test_a_student_of_one_s_own(distill: Command, lesson: Any, tmp_path: Path) -> None:
    said = distill("--student", "lesson:student", "--out", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    expected = {"teacher_parameters": 65_300, "student_parameters": 88, "steps": 4, "notes": []}
    assert {name: found[name] for name in expected} == expected
    assert set(found) - set(expected) == {"losses", "teacher_top1_on_search", "student_top1_on_search"}
    assert found["teacher_top1_on_search"] > 0.9
    assert len(found["losses"]) == 1
    module = lesson.student()
    module.load_state_dict(weights(tmp_path / "out"))
    x, y = lesson.task().splits["search"].batch(range(100)).args[0], lesson.task().splits["search"].labels
    with torch.no_grad():
        assert found["student_top1_on_search"] == pytest.approx(
            float((module.eval()(x).argmax(1) == y).double().mean())
        )
    assert "student: " in said.err
    assert parse_surgeries((tmp_path / "out/student/surgery.json").read_bytes(), "") == ()


def test_the_seed_draws_the_student_and_a_repeated_call_is_the_same(distill: Command, tmp_path: Path) -> None:
    def trained(out: str, *options: object) -> dict[str, torch.Tensor]:
        said = distill("--student", "lesson:student", "--out", tmp_path / out, *options)
        assert said.code == 0, said.err
        return weights(tmp_path / out)

    torch.manual_seed(11)
    first = trained("first")
    torch.manual_seed(12)
    second, other = trained("second"), trained("other", "--seed", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_a_call_that_was_interrupted_goes_on(distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--student", "lesson:student", "--cache", "--out")
    assert distill(*options, tmp_path / "whole").code == 0

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tersor.cli.distill.write_pruned", interrupted)
        assert distill(*options, tmp_path / "out").code != 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"training", "answers"}
    (kept,) = (tmp_path / "out/training").iterdir()
    written = kept.stat().st_mtime_ns
    said = distill(*options, tmp_path / "out")
    assert said.code == 0, said.err
    assert kept.stat().st_mtime_ns == written  # nothing was left to train
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_layers_of_the_teacher_are_compressed_next(
    distill: Command, command: Command, lesson: Any, problem: Any, tmp_path: Path, quick_latency: None
) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    said = distill(
        "--layers", 2, "--losses", "[kd, {hint: {weight: 0.1}}]", "--out", out, "--json", model="lesson:deep"
    )
    assert said.code == 0, said.err
    found = json.loads(said.out)  # what the model prints is not among it
    assert [note.split(":")[0] for note in found["notes"]] == ["hint"]
    (surgery,) = parse_surgeries((out / "student/surgery.json").read_bytes(), "")
    assert [(shrink.path, shrink.kept) for shrink in surgery.shrunk] == [("blocks", (0, 3))]
    said = command(
        "compress", "--model", "lesson:deep", "--task", "lesson:task", "--weights", out / "student", "--max-drop", 0.99,
        "--recipe", "convert", "--target", "eager", "--threads", 1, "--out", run, "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert json.loads(said.out)["deployed"]["parameters"] == found["student_parameters"]
    module = lesson.deep()
    module.blocks = nn.ModuleList([module.blocks[0], module.blocks[3]])
    module.load_state_dict(weights(out))
    x = problem.splits()["report"][0][:20]
    with torch.no_grad():
        expected = module.eval()(x)
    assert torch.equal(tersor.load(run / "artifact", model=lesson.deep)(x), expected)


def test_a_narrower_teacher(distill: Command, tmp_path: Path) -> None:
    said = distill("--width", 0.5, "--out", tmp_path / "out", "--losses", "[kd, attention_transfer]")
    assert said.code == 0, said.err
    assert "teacher parameters: 65,300" in said.out
    assert "attention_transfer: " in said.out
    assert weights(tmp_path / "out")["0.weight"].shape == (8, 1, 3, 3)


def test_less_is_better_is_told_as_it_is(distill: Command, tmp_path: Path) -> None:
    said = distill("--student", "lesson:student", "--out", tmp_path / "out", "--json", task="lesson:sure")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert 1 <= found["teacher_perplexity_on_search"] < found["student_perplexity_on_search"]


def test_without_labels_students_are_measured_by_agreement(distill: Command, tmp_path: Path) -> None:
    said = distill("--student", "lesson:student", "--out", tmp_path / "out", "--json", task="lesson:silent")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["teacher_agreement_on_search"] == 1
    assert 0 <= found["student_agreement_on_search"] < 1
    assert found["notes"] == ["the train split has no labels: the task's loss is left out"]


OWN = ("--student", "lesson:student")
WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "no student": ((), "name one student: --student"),
    "two students": ((*OWN, "--layers", 2), "name one student: --student"),
    "layers and width": (("--layers", 2, "--width", 0.5), "name one student"),
    "a student that is none": (("--student", "lesson:number"), "lesson:number must give a torch.nn.Module, got int"),
    "a student that is not there": (("--student", "lesson:nobody"), "--student: 'lesson' has no 'nobody'"),
    "other classes": (("--student", "lesson:wide"), "student returns (2, 5), the teacher (2, 4)"),
    "no repeated layers": (("--layers", 2), "has no repeated blocks"),
    "no width": (("--width", 0.0), "width"),
    "unknown loss": ((*OWN, "--losses", "kdd"), "did you mean 'kd'"),
    "losses that are no YAML": ((*OWN, "--losses", "[kd"), "--losses: not valid YAML"),
    "unknown setting": ((*OWN, "--schedule", "{epoch: 3}"), "Schedule.epoch"),
    "schedule that is a list": ((*OWN, "--schedule", "[3]"), "--schedule: expected settings such as '{epochs: 3"),
    "schedule that is no YAML": ((*OWN, "--schedule", "{"), "--schedule: not valid YAML"),
    "layers below one": (("--layers", 0), "--layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_wrong_and_leave_nothing(distill: Command, tmp_path: Path, name: str) -> None:
    options, said = WRONG[name]
    found = distill(*options, "--out", tmp_path / "out")
    assert found.code == 2, found.err
    assert said in " ".join(found.err.split())
    assert "Traceback" not in found.err
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_there_is_not_overwritten(distill: Command, tmp_path: Path) -> None:
    assert distill(*OWN, "--out", tmp_path / "out").code == 0
    before = (tmp_path / "out/student/weights.safetensors").read_bytes()
    found = distill(*OWN, "--out", tmp_path / "out")
    assert found.code != 0
    assert "already exists" in " ".join(found.err.split())
    assert (tmp_path / "out/student/weights.safetensors").read_bytes() == before


def test_other_losses_in_the_same_directory_are_refused(distill: Command, tmp_path: Path) -> None:
    assert distill(*OWN, "--out", tmp_path / "out").code == 0
    (tmp_path / "out/student").rename(tmp_path / "elsewhere")
    found = distill(*OWN, "--losses", "kd", "--out", tmp_path / "out")
    assert "belongs to another training" in " ".join(found.err.split())
    assert found.code != 0
    assert not (tmp_path / "out/student").exists()
