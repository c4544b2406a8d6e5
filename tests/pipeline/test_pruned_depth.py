"""Runs that remove whole blocks: artifacts that rebuild the module, and runs that go on after a crash."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.core.artifact import SURGERY, parse_surgeries, read_manifest
from tersor.distill import Recover
from tersor.errors import ArtifactError
from tersor.prune import DepthStep, Structured
from tersor.train import Schedule

pytestmark = pytest.mark.usefixtures("quick_latency")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


class Residual(nn.Module):
    """Images `[B, 1, 8, 8]` of the problem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).relu()).mean((2, 3)))


STEPS = [
    DepthStep(amount=0.25, criterion="loss"),
    Structured(amount=0.25),
    DepthStep(amount=0.3),
    Recover(schedule=Schedule(epochs=1, lr=0.01)),
]


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual().eval()


def run(problem: Any, out: Path, steps: list[Any], runtime: str) -> tersor.Result:
    return tersor.compress(
        build(), problem.small_task(), out=out, budget=tersor.Budget(max_drop=None, rounds=1),
        target=tersor.Target(runtime, threads=1), recipe=tersor.Recipe(steps),
    )  # fmt: skip


@pytest.fixture(scope="module")
def eager(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> tersor.Result:
    """Blocks out, units out, blocks out, training; for PyTorch."""
    with untimed():
        return run(problem, tmp_path_factory.mktemp("depth") / "run", STEPS, "eager")


def test_an_eager_artifact_is_built_without_the_blocks(eager: tersor.Result, problem: Any) -> None:
    images = problem.splits()["report"][0]
    with torch.no_grad():
        expected = eager.model(images)
    assert torch.equal(tersor.load(eager.artifact, model=build)(images), expected)
    surgeries = parse_surgeries((eager.artifact / SURGERY).read_bytes(), SURGERY)
    gone = [block.path for surgery in surgeries for block in surgery.skipped]
    assert [len(surgery.skipped) for surgery in surgeries] == [1, 0, 1]
    stored = load_file(eager.artifact / "model.safetensors")
    assert not any(name.startswith(f"{block}.") for name in stored for block in gone)
    assert read_manifest(eager.artifact).schema_version == 2
    with pytest.raises(ArtifactError, match="does not fit the Sequential"):
        tersor.load(eager.artifact, model=lambda: nn.Sequential(nn.Linear(2, 2)))


def test_onnxruntime_needs_no_class(problem: Any, tmp_path: Path) -> None:
    result = run(problem, tmp_path / "run", [DepthStep(amount=0.5)], "onnxruntime")
    assert SURGERY in read_manifest(result.artifact).files
    images = problem.splits()["report"][0][:50]
    with torch.no_grad():
        expected = result.model(images)
    torch.testing.assert_close(tersor.load(result.artifact)(images), expected, rtol=1e-4, atol=1e-4)
    assert result.report.ratios.macs > 1.9


def test_the_report_shows_the_blocks(eager: tersor.Result) -> None:
    first, _, second, _ = (record.pruning for record in eager.report.history)
    assert first is not None
    assert second is not None
    assert [(family.kind, family.units) for family in first.families] == [("block", 1)] * 4
    assert [sum(family.kept for family in pruning.families) for pruning in (first, second)] == [3, 2]
    assert second.parameters_after == eager.report.deployed.parameters
    page, card = ((eager.artifact / name).read_text() for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "prune.depth" in text
        assert "blocks.3" in text


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_run_goes_on_from_any_finished_step(
    eager: tersor.Result, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(eager.artifact.parent, out, ignore=shutil.ignore_patterns("artifact"))
    for position in range(finished + 1, 5):
        (out / "stages" / f"{position:02d}.safetensors").unlink()
    if finished == 3:
        monkeypatch.setattr(DepthStep, "apply", None)
    result = run(problem, out, STEPS, "eager")
    for name in ("model.safetensors", SURGERY):
        assert (result.artifact / name).read_bytes() == (eager.artifact / name).read_bytes()
