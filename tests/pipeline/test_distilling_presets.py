"""The presets that train: each runs through `compress`, is deployed, measured, and keeps what the model knew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.distill import train
from tersor.train import Schedule
from zoo import seeded


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Deep(nn.Module):
    """Four blocks one after another; images `[B, 1, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def deep(problem: Any) -> nn.Module:
    """`Deep`, trained."""
    schedule = Schedule(epochs=8, batch_size=50, lr=0.1)
    return train(seeded(Deep), nn.Identity(), problem.task(), losses="task", schedule=schedule).model


def compressed(problem: Any, model: nn.Module, recipe: str, out: Path) -> tersor.Result:
    return tersor.compress(
        model, problem.task(), out=out, recipe=recipe,
        budget=tersor.Budget(max_drop=0.05, rounds=1), target=tersor.Target("onnxruntime", threads=1),
    )  # fmt: skip


# Preset, its steps, most of the multiply-accumulates that may be left, most of the bytes that may be left.
PRESETS = [
    ("prune-distill", ["prune.structured", "recover"], 0.52, 0.8),
    ("shallow-int8", ["distill.every_kth", "recover", "quantize.static"], 0.55, 0.8),
    ("iterative-int8", ["prune.structured", "recover"] * 3 + ["quantize.static"], 0.75, 0.6),
    ("qat-distill", ["quantize.qat"], 1.0, 0.22),
]


@pytest.mark.usefixtures("quick_latency")
@pytest.mark.parametrize(("name", "steps", "macs", "size"), PRESETS, ids=[row[0] for row in PRESETS])
def test_a_preset_that_trains_keeps_what_the_model_knew(
    problem: Any, deep: nn.Module, tmp_path: Path, name: str, steps: list[str], macs: float, size: float
) -> None:
    result = compressed(problem, deep if name == "shallow-int8" else problem.model(), name, tmp_path / "run")
    report = result.report
    assert [record.name for record in report.history] == steps
    assert result.certified, report.certificate
    assert 1 / report.ratios.macs <= macs
    assert report.deployed.size_bytes < size * report.runtime_baseline.size_bytes
    x = problem.splits()["report"][0]
    with torch.no_grad():
        expected = result.model(x).argmax(1)
    assert (tersor.load(result.artifact)(x).argmax(1) == expected).double().mean() > 0.98
    assert not (tmp_path / "run" / "work").exists()
    losses = [note for record in report.history for note in record.notes if note.startswith("loss by epoch: ")]
    assert len(losses) == steps.count("recover") + steps.count("quantize.qat")
