"""Distillation in a run: interrupted and taken up, answers kept on the way, students of the model's own layers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.core.artifact import SURGERY, parse_surgeries, read_manifest
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.distill import EveryKth, Recover, train
from tersor.distill import recover as recovery
from tersor.errors import ArtifactError, ConfigError, DataError, ModelError, OrderError, SurgeryError, TersorError
from tersor.pipeline.run_directory import RUN
from tersor.prune import Unstructured
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import seeded, state_hash

pytestmark = pytest.mark.usefixtures("quick_latency")

BUDGET = tersor.Budget(max_drop=None, rounds=1)
SCHEDULE = Schedule(epochs=2, batch_size=50, lr=0.02)  # four steps in each of two epochs
TERMS = ["kd", {"hint": {"weight": 0.1}}, "task"]
RECIPE = tersor.Recipe([Unstructured(sparsity=0.5), Recover(losses=TERMS, schedule=SCHEDULE)])
FILES = ("model.safetensors",)


def run(problem: Any, out: Path, recipe: tersor.Recipe = RECIPE, **changed: Any) -> tersor.Result:
    fields = {"target": tersor.Target("eager", threads=1), "budget": BUDGET} | changed
    model, task = fields.pop("model", None) or problem.model(), fields.pop("task", None) or problem.small_task()
    return tersor.compress(model, task, out=out, recipe=recipe, **fields)


@pytest.fixture(scope="module")
def whole(problem: Any, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> tersor.Result:
    """The run that nobody disturbs."""
    with untimed():
        return run(problem, tmp_path_factory.mktemp("distilled") / "run")


def same(result: tersor.Result, expected: tersor.Result) -> bool:
    return all((result.artifact / name).read_bytes() == (expected.artifact / name).read_bytes() for name in FILES)


# --- interrupted


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts steps and ends at the one that is asked; every step is kept."""
    found, apply_masks = SimpleNamespace(done=0, last=-1), recovery.apply_masks
    minutes = iter(range(10**6))

    def counting(*arguments: Any) -> None:
        apply_masks(*arguments)
        found.done += 1
        if found.done == found.last:
            raise Stopped

    monkeypatch.setattr(recovery, "apply_masks", counting)
    monkeypatch.setattr("tersor.train.checkpoint.time", SimpleNamespace(monotonic=lambda: 61.0 * next(minutes)))
    return found


def work(out: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (out / "work").rglob("*") if path.is_file())


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_was_stopped_in_training_goes_on_there(
    problem: Any, whole: tersor.Result, tmp_path: Path, steps: SimpleNamespace, cached: bool
) -> None:
    recipe = tersor.Recipe([RECIPE.steps[0], Recover(losses=TERMS, schedule=SCHEDULE, cache=cached)])
    out, expected = tmp_path / "run", whole
    if cached:
        expected = run(problem, tmp_path / "cached", recipe)
        assert expected.report.history[1].notes == whole.report.history[1].notes
    steps.done = 0
    for last in (3, 4):
        steps.done, steps.last = 0, last
        with pytest.raises(Stopped):
            run(problem, out, recipe)
        assert steps.done == last
        assert work(out) == (["teacher", "training.pt"] if cached else ["training.pt"])
    steps.done, steps.last = 0, -1
    result = run(problem, out, recipe)
    assert steps.done == 8 - 2 - 3  # the step at which it was stopped is not kept
    assert same(result, expected)
    assert {path.name for path in out.iterdir()} == {RUN, "stages", "artifact"}
    steps.done = 0
    assert same(run(problem, out, recipe), expected)
    assert steps.done == 0


CHILD = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[3]]
import conftest, problem, tersor, tersor.pipeline.measuring, tersor.train.checkpoint
from types import SimpleNamespace
from pipeline.test_distilled import BUDGET, RECIPE
from tersor.distill import recover
steps, apply_masks = iter(range(100)), recover.apply_masks
def counting(*arguments):
    apply_masks(*arguments)
    if next(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
recover.apply_masks = counting
minutes = iter(range(1000))
tersor.train.checkpoint.time = SimpleNamespace(monotonic=lambda: 61.0 * next(minutes))
tersor.compress(problem.trained(), problem.small_task(), out=sys.argv[2], budget=BUDGET, recipe=RECIPE,
                target=tersor.Target("eager", threads=1))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_in_training_is_taken_up_by_another(
    problem: Any, whole: tersor.Result, tmp_path: Path, steps: SimpleNamespace
) -> None:
    tests, out = str(Path(__file__).resolve().parents[1]), tmp_path / "run"
    command = [sys.executable, "-c", CHILD, str(problem.directory), str(out), tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(problem.directory)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert work(out) == ["training.pt"]
    result = run(problem, out)
    assert steps.done == 8 - 5
    assert same(result, whole)
    assert not (out / "work").exists()


def test_what_a_finished_step_left_in_work_goes(problem: Any, whole: tersor.Result, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.artifact.parent, out, ignore=shutil.ignore_patterns("artifact"))
    (out / "work" / "02").mkdir(parents=True)  # killed between keeping the stage and clearing up
    (out / "work" / "02" / "training.pt").write_bytes(b"whatever")
    assert same(run(problem, out), whole)
    assert not (out / "work").exists()


# --- refused before any work


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[TersorError], str]] = {
    "labels that are needed": ({"losses": ["kd", "dkd"]}, {"labels": False}, DataError, "'dkd' needs labels"),
    "mixed labels": ({"losses": "dkd", "schedule": Schedule(mixup=0.2)}, {}, ConfigError, "leave mixup out"),
    "a cache of mixed examples": ({"cache": True, "schedule": Schedule(mixup=0.2)}, {}, ConfigError, "or the cache"),
    "smoothed labels of an own loss": (
        {"schedule": Schedule(label_smoothing=0.1)}, {"loss": nn.functional.cross_entropy}, ConfigError, "of your own"),
    "no metric to wait for": ({"schedule": Schedule(patience=1)}, {}, DataError, "recover needs a 'search' split"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_step(problem: Any, tmp_path: Path, name: str) -> None:
    settings, fields, error, said = REFUSED[name]
    splits = problem.small_splits()
    if not fields.get("labels", True):
        splits = {role: x for role, (x, _) in splits.items()}
    task = tersor.Task(**splits, **{key: value for key, value in fields.items() if key != "labels"})
    recipe = tersor.Recipe([Unstructured(sparsity=0.5), Recover(**settings)])
    with pytest.raises(error, match=said):
        run(problem, tmp_path / "run", recipe, task=task)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_cache_needs_a_run_directory(problem: Any) -> None:
    context = Context(problem.small_task(), tersor.Target("eager"), problem.model())
    with pytest.raises(ConfigError, match=r"recover\.cache needs a run directory"):
        Recover(cache=True).apply(Candidate(problem.model()), context)


# --- students of the model's own layers


class Block(nn.Module):
    """A residual block that knows its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.conv, self.norm = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Deep(nn.Module):
    """Six blocks in a list; images `[B, 1, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.blocks = nn.ModuleList(Block(number) for number in range(6))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def build() -> nn.Module:
    return seeded(Deep)


@pytest.fixture(scope="module")
def deep(problem: Any) -> nn.Module:
    """`Deep`, trained a little."""
    schedule = Schedule(epochs=6, batch_size=50, lr=0.1)
    return train(build(), nn.Identity(), problem.task(), losses="task", schedule=schedule).model


STUDENT = tersor.Recipe([EveryKth(), Recover(losses=TERMS, schedule=SCHEDULE)])


@pytest.fixture(scope="module")
def shallow(problem: Any, deep: nn.Module, untimed: Any, tmp_path_factory: pytest.TempPathFactory) -> tersor.Result:
    """Half of the blocks, trained; for PyTorch."""
    with untimed():
        return run(problem, tmp_path_factory.mktemp("shallow") / "run", STUDENT, model=deep)


def test_a_shallow_artifact_is_loaded_by_the_class_and_its_surgery(problem: Any, shallow: tersor.Result) -> None:
    x = problem.splits()["report"][0]
    assert len(shallow.model.blocks) == 3
    assert [block.layer_idx for block in shallow.model.blocks] == [0, 1, 2]
    with torch.no_grad():
        expected = shallow.model(x)
    assert torch.equal(tersor.load(shallow.artifact, model=build)(x), expected)
    (surgery,) = parse_surgeries((shallow.artifact / SURGERY).read_bytes(), SURGERY)
    assert [(shrink.path, shrink.kept) for shrink in surgery.shrunk] == [("blocks", (0, 3, 5))]
    stored = load_file(shallow.artifact / "model.safetensors")
    assert {name.split(".")[1] for name in stored if name.startswith("blocks.")} == {"0", "1", "2"}
    assert read_manifest(shallow.artifact).schema_version == 2
    with pytest.raises(ArtifactError, match="does not fit"):
        tersor.load(shallow.artifact, model=problem.model)


def test_the_report_tells_which_layers_stayed(shallow: tersor.Result) -> None:
    first, second = shallow.report.history
    assert (first.name, second.name) == ("distill.every_kth", "recover")
    assert first.notes == ["layers that stay in 'blocks': [0, 3, 5]"]
    assert any(note.startswith("hint: ") for note in second.notes)
    assert "distill.every_kth" in (shallow.artifact / "report.html").read_text()


def test_layers_that_stay_start_from_the_original_s_weights(problem: Any, deep: nn.Module, tmp_path: Path) -> None:
    result = run(problem, tmp_path / "run", tersor.Recipe([EveryKth(layers=2, keep="first")]), model=deep)
    for position in (0, 1):
        assert state_hash(result.model.blocks[position]) == state_hash(deep.blocks[position])
    assert torch.equal(result.model.head.weight, deep.head.weight)
    assert len(deep.blocks) == 6


@pytest.mark.parametrize(("settings", "kept"), [({"share": 0.34}, 2), ({"share": 0.01}, 1), ({"layers": 5}, 5)])
def test_how_many_layers_stay(
    problem: Any, deep: nn.Module, tmp_path: Path, settings: dict[str, Any], kept: int
) -> None:
    result = run(problem, tmp_path / "run", tersor.Recipe([EveryKth(**settings, path="blocks")]), model=deep)
    assert len(result.model.blocks) == kept


def test_a_shallow_student_is_quantized_and_needs_no_class(problem: Any, deep: nn.Module, tmp_path: Path) -> None:
    recipe = tersor.Recipe([*STUDENT.steps, Static()])
    result = run(problem, tmp_path / "run", recipe, model=deep, target=tersor.Target("onnxruntime", threads=1))
    x = problem.splits()["report"][0][:50]
    with torch.no_grad():
        expected = result.model(x)
    assert (tersor.load(result.artifact)(x) - expected).norm() < 0.03 * expected.norm()
    assert result.report.ratios.macs > 1.5


@pytest.mark.parametrize("finished", [1, 2])
def test_a_shallow_run_goes_on_from_a_finished_step(
    problem: Any, deep: nn.Module, shallow: tersor.Result, tmp_path: Path, finished: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(shallow.artifact.parent, out, ignore=shutil.ignore_patterns("artifact"))
    for position in range(finished + 1, 3):
        (out / "stages" / f"{position:02d}.safetensors").unlink()
    assert same(run(problem, out, STUDENT, model=deep), shallow)


def test_masks_shrink_with_the_layers(problem: Any, deep: nn.Module, tmp_path: Path) -> None:
    recipe = tersor.Recipe([Unstructured(sparsity=0.5), *STUDENT.steps])
    result = run(problem, tmp_path / "run", recipe, model=deep)
    for block in result.model.blocks:
        assert (block.conv.weight == 0).double().mean() > 0.3


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"path": "block"}, ConfigError, r"path: expected .* it has \['blocks'\]"),
        ({"layers": 7}, ConfigError, "layers: expected 1 to 6, for 'blocks' has 6; got 7"),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    problem: Any, deep: nn.Module, tmp_path: Path, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(problem, tmp_path / "run", tersor.Recipe([EveryKth(**settings)]), model=deep)


def test_a_model_without_repeated_layers_is_refused_before_the_first_step(problem: Any, tmp_path: Path) -> None:
    recipe = tersor.Recipe([Unstructured(sparsity=0.5), EveryKth()])
    with pytest.raises(ModelError, match="has no repeated blocks"):
        run(problem, tmp_path / "run", recipe)
    assert not (tmp_path / "run" / "stages").exists()


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="either layers or share, not both"):
        EveryKth(layers=2, share=0.5)
    with pytest.raises(OrderError):
        tersor.Recipe([Static(), EveryKth()])


def test_after_quantization_the_plan_goes(problem: Any, deep: nn.Module) -> None:
    context = Context(problem.small_task(), tersor.Target(threads=1), frozen_copy(deep))
    done = EveryKth().apply(Static().apply(Candidate(frozen_copy(deep)), context), context)
    assert (done.plan, done.simulation, done.precision) == (None, None, "float32")
    assert not any(parameter.requires_grad for parameter in done.module.parameters())


def test_a_model_that_no_surgery_can_write_down_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, max_window_layers=2,
    )  # fmt: skip
    model = seeded(lambda: transformers.Qwen2ForCausalLM(config))
    task = tersor.Task(train={"input_ids": torch.arange(40).reshape(10, 4) % 16}, output="logits")
    with pytest.raises(SurgeryError, match="configured layer by layer"):
        EveryKth(layers=2).apply(Candidate(model), Context(task, tersor.Target("eager"), model))
