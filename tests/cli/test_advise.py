"""`tersor advise`: what the function says, as text and as JSON, and one exit code per mistake."""

from __future__ import annotations

import json
from typing import Any

import pytest

import tersor
from cli.commands import Command
from tersor.search.advisor import advise


@pytest.fixture
def advised(command: Command, in_problem: None) -> Command:
    """`tersor advise …` in the directory of the problem's module."""

    def run(*options: object, model: str = "problem:build", task: str = "problem:small_task") -> Any:
        return command("advise", "--model", model, "--task", task, *options)

    return run


@pytest.mark.parametrize(("scenario", "target"), [("edge", "onnxruntime"), ("server", "eager")])
def test_it_prints_what_the_function_gives(advised: Command, problem: Any, scenario: Any, target: str) -> None:
    said = advised("--scenario", scenario, "--target", target, "--max-drop", 0.02, "--json")
    assert said.code == 0, said.err
    expected = advise(
        problem.module.build(),
        problem.small_task(),
        scenario=scenario,
        target=tersor.Target(target),
        budget=tersor.Budget(max_drop=0.02),
    )
    assert json.loads(said.out) == json.loads(expected.model_dump_json())
    assert json.loads(said.out)["family"] == "cnn"


def test_the_text_has_everything_that_a_reader_needs(advised: Command) -> None:
    said = advised("--scenario", "edge")
    assert said.code == 0, said.err
    text = " ".join(said.out.split())
    for part in (
        *("family: cnn", "convolutions 99.96 %", "target: onnxruntime for edge", "recommended: cnn-edge"),
        *("because int8 alone leaves", "alternative: int8", "measured elsewhere: ResNet-56 on CIFAR-10, onnxruntime"),
        *("[benchmarks/results/int8_peers.json]", "your model: weights 261 kB -> about", "ruled out", "FP8"),
        *("not measured: no benchmark", "tersor compress --recipe cnn-edge", "--recipe auto --minutes 20"),
    ):
        assert part in text, part


def test_weights_are_read(advised: Command, problem: Any) -> None:
    said = advised("--scenario", "server", "--json", "--weights", problem.directory / "weights.safetensors")
    assert said.code == 0, said.err
    assert json.loads(said.out)["recommended"]["preset"] == "int8"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--scenario", "moon"], 2, "scenario: expected one of ['edge', 'server', 'constrained', 'gpu'], got 'moon'"),
        (["--scenario", "edge", "--target", "abacus"], 2, "Target.runtime"),
        (["--scenario", "edge", "--max-drop", -1], 2, "Budget.max_drop"),
        (["--scenario", "edge", "--weights", "nowhere.safetensors"], 4, "does not exist"),
        ([], 2, "--scenario"),
    ],
)
def test_every_mistake_has_its_exit_code(advised: Command, options: list[object], code: int, said: str) -> None:
    found = advised(*options)
    assert found.code == code, found.err
    assert said in found.err
    assert found.out == ""
    assert "Traceback" not in found.err


def test_a_model_that_does_not_fit_the_task_is_refused(advised: Command, problem: Any) -> None:
    (problem.directory / "flat.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(5, 3)\n")
    found = advised("--scenario", "edge", model="flat:build")
    assert found.code == 2
    assert "ModelError: the model does not run on the task's first examples" in found.err
