"""`tersor prune`: the same result as the function, whole files or none, and one exit code per cause."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tersor
from cli.commands import Command, Said
from tersor.core.artifact import parse_surgeries

TEXT = """
import tersor, torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.wide, self.narrow = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
    def forward(self, tokens):
        print("forward")
        hidden = self.embedding(tokens)
        return self.head(hidden + self.narrow(self.wide(hidden).relu())).mean(1)

def build():
    torch.manual_seed(0)
    return Tied()

def task():
    return tersor.Task(calibrate={"tokens": torch.arange(60).reshape(10, 6) % 20})
"""


@pytest.fixture
def prune(command: Command, in_problem: None) -> Command:
    """`tersor prune …` in the directory of the problem's module."""

    def run(*options: object, model: str = "problem:trained", task: str = "problem:small_task") -> Said:
        return command("prune", "--model", model, "--task", task, *options)

    return run


def rebuilt(module: nn.Module, directory: Path) -> nn.Module:
    """What anybody does with the two files."""
    for surgery in parse_surgeries((directory / "surgery.json").read_bytes(), "surgery.json"):
        module = tersor.graph.apply_surgery(module, surgery)
    module.load_state_dict(load_file(directory / "weights.safetensors"))
    return module.eval()


def test_it_prints_and_writes_what_the_function_gives(prune: Command, problem: Any, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    said = prune("--amount", 0.5, "--criterion", "taylor", "--round-to", 8, "--out", out, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    parameters = sum(parameter.numel() for parameter in problem.net.parameters())
    assert found["params_before"] == parameters
    assert found["macs_before"] == 16 * 9 * 64 + 64 * 16 * 9 * 16 + 96 * 64 * 9 * 16 + 96 * 4
    assert [(family["units"], family["kept"]) for family in found["families"]] == [(16, 8), (64, 32), (96, 48)]
    assert [item["name"] for item in found["frozen"]] == ["11.weight[0]"]
    assert found["max_error"] < 1e-4
    assert set(found["seconds"]) == {"coupling", "scoring", "surgery", "verification"}
    assert sorted(path.name for path in out.iterdir()) == ["surgery.json", "weights.safetensors"]
    module, images = rebuilt(problem.module.build(), out), problem.splits()["report"][0]
    assert sum(parameter.numel() for parameter in module.parameters()) == found["params_after"]
    split = problem.small_task().splits["calibrate"]
    expected = tersor.prune.structured(
        problem.model(),
        [images[:2], images[:3]],
        amount=0.5,
        criterion="taylor",
        round_to=8,
        data=[split.batch(range(128)[start : start + 32]) for start in range(0, 128, 32)],
        loss=torch.nn.functional.cross_entropy,
    )
    with torch.no_grad():
        assert torch.allclose(module(images), expected.model(images), atol=1e-5)


def test_the_table_shows_families_and_reasons(prune: Command) -> None:
    said = prune("--target", "macs=0.5")
    assert said.code == 0, said.err
    for part in ("4.weight[0]", "channel", "MACs", "frozen: 11.weight[0]", "verified against the masked model"):
        assert part in said.out
    assert "pruned model" not in said.err  # nothing was asked to be kept


def test_a_dry_run_only_couples(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.prune.Structured.prune", None)
    said = prune("--dry-run", "--json", "--out", tmp_path / "out", "--exclude", "0.*")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert [(family["name"], family["units"]) for family in found["families"]] == [
        ("4.weight[0]", 64),
        ("7.weight[0]", 96),
    ]
    assert {item["name"]: item["reason"] for item in found["frozen"]}["0.weight[0]"] == "excluded"
    assert 0.9 < found["coverage"] < 1
    assert not (tmp_path / "out").exists()
    assert "2 families touch" in prune("--dry-run", "--exclude", "0.*").out


def test_models_that_print_and_tie_their_weights(prune: Command, problem: Any, tmp_path: Path) -> None:
    (problem.directory / "tied.py").write_text(TEXT)
    out = tmp_path / "pruned"
    said = prune("--out", out, "--json", model="tied:build", task="tied:task")
    assert said.code == 0, said.err
    assert "forward" in said.err
    json.loads(said.out)
    module = rebuilt(sys.modules["tied"].build(), out)
    assert module.get_parameter("head.weight") is module.get_parameter("embedding.weight")
    assert module.get_parameter("wide.weight").shape[0] < 24
    assert {"head.weight", "embedding.weight"} <= set(load_file(out / "weights.safetensors"))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--amount", 1.5], 2, "Structured.amount"),
        (["--amount", 0.5, "--target", "macs=0.5"], 2, "one of amount, target"),
        (["--target", "macs"], 2, "--target: expected e.g. macs=0.7, got 'macs'"),
        (["--target", "watts=1"], 2, "watts"),
        (["--criterion", "magic"], 2, "criterion: expected one of"),
        (["--verify", "maybe"], 2, "Structured.verify"),
        (["--exclude", "*"], 2, "CoverageError: nothing of Sequential can be pruned"),
        (["--exclude", "*", "--dry-run"], 2, "CoverageError: nothing of Sequential can be pruned"),
        (["--weights", "nowhere.safetensors"], 4, "does not exist"),
    ],
)
def test_every_mistake_has_its_exit_code(prune: Command, options: list[object], code: int, said: str) -> None:
    found = prune(*options)
    assert found.code == code, found.err
    assert said in found.err
    assert found.out == ""
    assert "Traceback" not in found.err


def test_a_directory_that_is_taken_is_left_alone(prune: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    said = prune("--out", tmp_path / "out")
    assert said.code == 4
    assert "already exists" in said.err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_crash_while_writing_leaves_nothing(prune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(surgeries: object) -> bytes:
        raise RuntimeError("power cut")

    monkeypatch.setattr("tersor.prune.saved.dump_surgeries", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        prune("--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what was written is read back


@pytest.fixture
def compressed(command: Command, quick_latency: None) -> Command:
    """`tersor compress …` of the problem, without a certificate."""

    def run(*options: object) -> Said:
        arguments = ["compress", "--model", "problem:build", "--task", "problem:small_task", "--json"]
        arguments += ["--max-drop", "0.5", "--rounds", "1", "--threads", "1", "--recipe", "convert"]
        return command(*arguments, *options)

    return run


def test_a_pruned_directory_is_pruned_again_and_compressed(
    prune: Command, compressed: Command, problem: Any, tmp_path: Path
) -> None:
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    assert prune("--amount", 0.5, "--out", first).code == 0
    said = prune("--weights", first, "--amount", 0.25, "--out", second, "--json", model="problem:build")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert [(family["units"], family["kept"]) for family in found["families"]] == [(8, 6), (32, 24), (48, 36)]
    assert len(parse_surgeries((second / "surgery.json").read_bytes(), "surgery.json")) == 2
    module, images = rebuilt(problem.module.build(), second), problem.splits()["report"][0]
    said = compressed("--weights", second, "--target", "eager", "--out", run)
    assert said.code == 0, said.err
    assert json.loads(said.out)["deployed"]["parameters"] == found["params_after"]
    with torch.no_grad():
        expected = module(images)
    assert torch.equal(tersor.load(run, model=problem.module.build)(images), expected)


@pytest.mark.parametrize(
    ("file", "content", "code", "said"),
    [
        ("surgery.json", b"[{", 4, "IntegrityError: "),
        ("surgery.json", b"{}", 4, "no list of surgeries"),
        ("surgery.json", None, 4, "has no surgery.json; expected the directory that tersor prune --out wrote"),
        ("weights.safetensors", b"?", 4, "is damaged"),
        ("weights.safetensors", None, 4, "has no weights.safetensors"),
        ("surgery.json", b"[]", 2, "must be of one pruning"),
    ],
)
def test_a_damaged_directory_has_its_exit_code(
    prune: Command, tmp_path: Path, file: str, content: bytes | None, code: int, said: str
) -> None:
    out = tmp_path / "pruned"
    assert prune("--out", out).code == 0
    (out / file).unlink()
    if content is not None:
        (out / file).write_bytes(content)
    found = prune("--weights", out, model="problem:build")
    assert found.code == code, found.err
    assert said in found.err
    assert "Traceback" not in found.err
