"""Runs that start from a model that was pruned before: their artifacts know the whole way from the model as built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tersor
from tersor.core.artifact import SURGERY, parse_surgeries, read_manifest
from tersor.core.candidate import frozen_copy
from tersor.distill import Recover
from tersor.errors import ConfigError, ModelError, OutputDirectoryError
from tersor.prune import Structured
from tersor.prune.masks import check
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import MLP_DATA, Mlp, context_for, quantized, seeded

pytestmark = pytest.mark.usefixtures("quick_latency")

BUDGET = tersor.Budget(max_drop=None, rounds=1)
TRAIN = Recover(schedule=Schedule(epochs=1, lr=0.01))


def pruned(problem: Any) -> tersor.Candidate:
    report = tersor.prune.structured(problem.model(), problem.splits()["report"][0][:2], amount=0.25)
    return tersor.Candidate(report.model, surgeries=(report.surgery,))


def run(problem: Any, start: Any, out: Path, steps: list[Any], runtime: str = "eager") -> tersor.Result:
    return tersor.compress(
        start, problem.small_task(), out=out, budget=BUDGET, target=tersor.Target(runtime, threads=1),
        recipe=tersor.Recipe(steps),
    )  # fmt: skip


@pytest.mark.parametrize("steps", [[], [Structured(amount=0.25), TRAIN]], ids=["only moved", "cut again"])
def test_an_eager_artifact_loads_from_the_model_as_built(problem: Any, tmp_path: Path, steps: list[Any]) -> None:
    start = pruned(problem)
    result = run(problem, start, tmp_path / "run", steps)
    images = problem.splits()["report"][0]
    session = tersor.load(result.artifact, model=problem.module.build)
    with torch.no_grad():
        assert torch.equal(session(images), result.model(images))
    surgeries = parse_surgeries((result.artifact / SURGERY).read_bytes(), SURGERY)
    assert surgeries[:1] == start.surgeries
    assert len(surgeries) == 1 + bool(steps)
    assert read_manifest(result.artifact).schema_version == 2
    assert "as it was before pruning" in (result.artifact / "README.md").read_text()
    assert result.report.baseline.parameters == sum(p.numel() for p in start.module.parameters())
    with pytest.raises(tersor.TersorError, match="does not fit"):
        tersor.load(result.artifact, model=lambda: start.module)


def test_without_the_surgeries_the_pruned_class_is_needed(problem: Any, tmp_path: Path) -> None:
    start = pruned(problem)
    result = run(problem, start.module, tmp_path / "run", [])
    assert SURGERY not in read_manifest(result.artifact).files
    images = problem.splits()["report"][0]
    with torch.no_grad():
        expected = start.module(images)
    assert torch.equal(tersor.load(result.artifact, model=lambda: frozen_copy(start.module))(images), expected)
    with pytest.raises(OutputDirectoryError, match="its model differ"):
        run(problem, start, tmp_path / "run", [])


def test_a_killed_run_goes_on(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, steps = pruned(problem), [Structured(amount=0.25), TRAIN]
    whole = run(problem, start, tmp_path / "whole", steps)
    with monkeypatch.context() as patch:
        patch.setattr(Recover, "apply", lambda *given: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run(problem, start, tmp_path / "run", steps)
    monkeypatch.setattr(Structured, "apply", None)  # it is done
    result = run(problem, start, tmp_path / "run", steps)
    for name in ("model.safetensors", SURGERY):
        assert (result.artifact / name).read_bytes() == (whole.artifact / name).read_bytes()


def test_other_runtimes_take_it_as_it_is(problem: Any, tmp_path: Path) -> None:
    result = run(problem, pruned(problem), tmp_path / "run", [Static()], "onnxruntime")
    assert read_manifest(result.artifact).schema_version == 1
    images = problem.splits()["report"][0][:20]
    with torch.no_grad():
        expected = result.model(images)
    assert (tersor.load(result.artifact)(images) - expected).norm() < 0.02 * expected.norm()


def test_masks_of_before_hold(problem: Any, tmp_path: Path) -> None:
    report = tersor.prune.unstructured(problem.model(), amount=0.5)
    result = run(problem, tersor.Candidate(report.model, masks=report.masks), tmp_path / "run", [TRAIN])
    check(result.model, report.masks)
    assert result.report.coverage.parameters_pruned > 0.4


def with_wrong_masks(model: nn.Module) -> tersor.Candidate:
    return tersor.Candidate(model, masks={"0.weight": torch.zeros(16, 1, 3, 3, dtype=torch.bool)})


def in_integers(model: nn.Module) -> tersor.Candidate:
    return quantized(seeded(Mlp), context_for(seeded(Mlp), MLP_DATA))


@pytest.mark.parametrize(
    ("start", "error", "said"),
    [
        (with_wrong_masks, ModelError, "masked weights of '0.weight' are not zero"),
        (in_integers, ConfigError, "expected a float model, got a quantized candidate"),
        (lambda model: tersor.Candidate("model"), ConfigError, "expected a torch.nn.Module, got str"),
    ],
)
def test_what_cannot_be_started_from_is_refused(
    problem: Any, tmp_path: Path, start: Callable[[nn.Module], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(problem, start(problem.model()), tmp_path / "run", [])
    assert list(tmp_path.iterdir()) == []
