"""Runs that remove whole units: artifacts that rebuild the module, and runs that go on after a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.core.artifact import SURGERY, parse_surgeries, read_manifest
from tersor.core.weights import tensors_hash
from tersor.distill import Recover
from tersor.errors import ArtifactError, IntegrityError
from tersor.prune import Structured, Unstructured
from tersor.quantize import Static
from tersor.train import Schedule

pytestmark = pytest.mark.usefixtures("quick_latency")

BUDGET = tersor.Budget(max_drop=0.05, rounds=1)
TRAIN = Recover(schedule=Schedule(epochs=1, lr=0.01))
TWICE = [Structured(amount=0.25), Unstructured(sparsity=0.3), Structured(amount=0.25, criterion="taylor"), TRAIN]


def run(problem: Any, out: Path, steps: list[Any], runtime: str = "eager") -> tersor.Result:
    return tersor.compress(
        problem.model(), problem.small_task(), out=out, budget=BUDGET, target=tersor.Target(runtime, threads=1),
        recipe=tersor.Recipe(steps),
    )  # fmt: skip


@pytest.fixture(scope="module")
def eager(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> tersor.Result:
    """Units out, zeros, units out, training; for PyTorch."""
    with untimed():
        return run(problem, tmp_path_factory.mktemp("eager") / "run", TWICE)


@pytest.fixture
def copied(eager: tersor.Result, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(eager.artifact, tmp_path / "artifact"))


# --- artifacts


def test_an_eager_artifact_rebuilds_the_pruned_module(eager: tersor.Result, problem: Any) -> None:
    images = problem.splits()["report"][0]
    session = tersor.load(eager.artifact, model=problem.module.build)
    with torch.no_grad():
        assert torch.equal(session(images), eager.model(images))
    stored = load_file(eager.artifact / "model.safetensors")
    assert {name: tensor.shape for name, tensor in eager.model.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    assert stored["4.weight"].shape == (36, 9, 3, 3)  # 64 -> 48 -> 36, 16 -> 12 -> 9


def test_inductor_artifacts_are_rebuilt_alike(problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)  # needs a C++ compiler and half a minute
    result = run(problem, tmp_path / "run", [Structured(amount=0.5)], "inductor")
    images = problem.splits()["report"][0][:20]
    with torch.no_grad():
        expected = result.model(images)
    assert torch.allclose(tersor.load(result.artifact, model=problem.module.build)(images), expected, atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_need_no_class(problem: Any, tmp_path: Path, runtime: str) -> None:
    result = run(problem, tmp_path / "run", [Structured(amount=0.25), TRAIN, Static()], runtime)
    manifest = read_manifest(result.artifact)
    assert (manifest.schema_version, manifest.precision) == (1, "int8")  # whoever reads version 1 can run it
    assert SURGERY in manifest.files
    images = problem.splits()["report"][0][:50]
    with torch.no_grad():
        expected = result.model(images)
    assert (tersor.load(result.artifact)(images) - expected).norm() < 0.02 * expected.norm()
    assert result.report.ratios.macs > 1.5
    assert result.report.deployed.parameters < 0.65 * result.report.baseline.parameters


def test_the_surgery_is_a_file_like_the_others(eager: tersor.Result, problem: Any) -> None:
    manifest = read_manifest(eager.artifact)
    assert manifest.schema_version == 2  # an older tersor would not cut before it fills
    assert SURGERY in manifest.files
    surgeries = parse_surgeries((eager.artifact / SURGERY).read_bytes(), SURGERY)
    assert len(surgeries) == 2
    module = problem.module.build()
    for surgery in surgeries:
        module = tersor.graph.apply_surgery(module, surgery)
    module.load_state_dict(load_file(eager.artifact / "model.safetensors"))
    images = problem.splits()["report"][0]
    with torch.no_grad():
        assert torch.equal(module.eval()(images), eager.model(images))
    assert SURGERY in (eager.artifact / "README.md").read_text()


def test_without_pruning_there_is_no_surgery(deployed: Any) -> None:
    artifact = deployed("eager", "convert").artifact
    assert not (artifact / SURGERY).exists()
    assert read_manifest(artifact).schema_version == 1


WRONG: list[tuple[Callable[[Any], nn.Module], str]] = [
    (lambda problem: nn.Linear(2, 3), "surgery.*does not fit the Linear.*'0.weight'"),
    (lambda problem: nn.Sequential(nn.Conv2d(1, 99, 3)), "surgery.*must have size 16"),
    (lambda problem: tersor.prune.structured(problem.module.build(), torch.zeros(2, 1, 8, 8)).model, "must have size"),
]


@pytest.mark.parametrize(("build", "said"), WRONG, ids=["other class", "other size", "already pruned"])
def test_a_model_that_does_not_fit_is_refused(
    eager: tersor.Result, problem: Any, build: Callable[[Any], nn.Module], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        tersor.load(eager.artifact, model=lambda: build(problem))


def test_a_missing_class_is_asked_for(eager: tersor.Result) -> None:
    with pytest.raises(ArtifactError, match="give the class"):
        tersor.load(eager.artifact)


def test_a_changed_surgery_is_noticed(copied: Path, problem: Any) -> None:
    content = json.loads((copied / SURGERY).read_text())
    content[0]["cuts"][0]["kept"][0] += 1
    (copied / SURGERY).write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=SURGERY):
        tersor.load(copied, model=problem.module.build)
    (copied / SURGERY).unlink()
    with pytest.raises(IntegrityError, match=r"surgery\.json is missing"):
        tersor.load(copied, model=problem.module.build)


# --- the report


def test_the_report_carries_what_was_found(eager: tersor.Result) -> None:
    report = eager.report
    prunings = [record.pruning for record in report.history if record.pruning is not None]
    assert [[(family.units, family.kept) for family in pruning.families] for pruning in prunings] == [
        [(16, 12), (64, 48), (96, 72)],
        [(12, 9), (48, 36), (72, 54)],
    ]
    assert prunings[0].parameters_before == report.baseline.parameters
    assert prunings[0].parameters_after == prunings[1].parameters_before
    assert prunings[1].parameters_after == report.deployed.parameters
    assert prunings[1].macs_after == report.deployed.macs
    page, card = ((eager.artifact / name).read_text() for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "Pruning" in text
        assert "as it was before pruning" in card
    assert "it is an output of the model" in page
    assert "4.weight[0]" in page


# --- resuming


def stage(out: Path, position: int) -> Path:
    return out / "stages" / f"{position:02d}.safetensors"


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_run_goes_on_from_any_finished_step(
    eager: tersor.Result, problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(eager.artifact.parent, out, ignore=shutil.ignore_patterns("artifact"))
    for position in range(finished + 1, 5):
        stage(out, position).unlink()
    applied: list[str] = []
    for kind in (Structured, Unstructured, Recover):
        original = kind.apply
        monkeypatch.setattr(
            kind, "apply", lambda self, *given, _apply=original: applied.append(self.name) or _apply(self, *given)
        )
    result = run(problem, out, TWICE)
    assert applied == [step.name for step in TWICE[finished:]]
    for name in ("model.safetensors", SURGERY):
        assert (result.artifact / name).read_bytes() == (eager.artifact / name).read_bytes()
    assert [record.pruning for record in result.report.history] == [record.pruning for record in eager.report.history]


def test_a_finished_run_hands_back_the_pruned_model(eager: tersor.Result, problem: Any) -> None:
    again = run(problem, eager.artifact.parent, TWICE)
    images = problem.splits()["report"][0]
    with torch.no_grad():
        assert torch.equal(again.model(images), eager.model(images))


def tampered(path: Path, change: Callable[[dict[str, torch.Tensor]], None], *, sealed: bool) -> None:
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as stream:
        metadata = stream.metadata()
    change(tensors)
    save_file(tensors, path, metadata | ({"sha256": tensors_hash(tensors)} if sealed else {}))


def cut_otherwise(tensors: dict[str, torch.Tensor]) -> None:
    content = json.loads(tensors["surgery"].numpy().tobytes())
    content[0]["cuts"][0]["kept"] = list(range(12))
    tensors["surgery"] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("sealed", "said"), [(False, "damaged"), (True, "cut otherwise")])
def test_a_surgery_that_was_changed_in_a_stage_is_noticed(
    eager: tersor.Result, problem: Any, tmp_path: Path, sealed: bool, said: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(eager.artifact.parent, out, ignore=shutil.ignore_patterns("artifact"))
    tampered(stage(out, 2), cut_otherwise, sealed=sealed)
    with pytest.raises(IntegrityError, match=rf"02\.safetensors.*{said}"):
        run(problem, out, TWICE)


def test_another_amount_is_another_run(eager: tersor.Result, problem: Any) -> None:
    with pytest.raises(tersor.TersorError, match="its recipe differ"):
        run(problem, eager.artifact.parent, [Structured(amount=0.3), *TWICE[1:]])
