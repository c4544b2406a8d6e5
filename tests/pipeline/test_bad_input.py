"""Bad models, data, budgets and disks: a typed error that says what, where and what to do, and nothing half written."""

from __future__ import annotations

import copy
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import tersor
from tersor.cli.loading import load_candidate
from tersor.core.artifact import verify
from tersor.distill import Recover
from tersor.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    MeasurementError,
    ModelError,
    NonFiniteError,
    OutputDirectoryError,
    OutputError,
    OverlapError,
    RuntimeUnavailableError,
    SplitTooSmallError,
    UnsupportedError,
)
from tersor.measure import latency
from tersor.prune import Unstructured
from tersor.quantize import Static
from tersor.report import render_html
from tersor.runtimes.eager import Eager
from tersor.train import Schedule

pytestmark = pytest.mark.usefixtures("quick_latency")

BUDGET = tersor.Budget(max_drop=0.05, rounds=1)
EAGER = tersor.Target("eager", threads=1)
ONNX = tersor.Target("onnxruntime", threads=1)
OPENVINO = tersor.Target("openvino", threads=1)
TRAINING = tersor.Recipe([Unstructured(sparsity=0.2), Recover(schedule=Schedule(batch_size=50))])
BAD = [math.nan, math.inf, -math.inf]


class Fails:
    """Runs `compress` where it must fail, and looks at what it left."""

    def __init__(self, problem: Any, noticed: Callable[[nn.Module], str], directory: Path) -> None:
        self.problem = problem
        self.noticed = noticed
        self.out = directory / "runs" / "run"

    def __call__(self, error: type[Exception], match: str, **changed: Any) -> str:
        """The message; `before=True` says that it must come before anything is written at all."""
        before_work = changed.pop("before", False)
        arguments = {"out": self.out, "budget": BUDGET, "target": EAGER, "recipe": "convert"} | changed
        model = arguments.pop("model", self.problem.model())
        task = arguments.pop("task", None) or self.problem.small_task()
        hash_before = self.noticed(model) if isinstance(model, nn.Module) else None
        with pytest.raises(error, match=match) as caught:
            tersor.compress(model, task, **arguments)
        assert type(caught.value) is error
        assert isinstance(caught.value, tersor.TersorError)
        if hash_before is not None:
            assert self.noticed(model) == hash_before
        left = sorted(path.relative_to(self.out).as_posix() for path in self.out.rglob("*"))
        assert [name for name in left if name.startswith(("artifact", "."))] == []
        assert all(name in ("run.json", "stages") or name.endswith(".safetensors") for name in left)
        assert not before_work or not self.out.parent.exists()
        return str(caught.value)


@pytest.fixture
def fails(problem: Any, noticed: Callable[[nn.Module], str], tmp_path: Path) -> Fails:
    return Fails(problem, noticed, tmp_path)


def with_value(tensor: Tensor, index: int, value: float) -> Tensor:
    """A copy in which one example holds `value`."""
    found = tensor.clone()
    found[index].view(-1)[3] = value
    return found


# --- models


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["4.weight", "1.bias", "5.running_var"])
def test_weights_that_are_not_finite(fails: Fails, problem: Any, name: str, bad: float) -> None:
    model = problem.model()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[2] = bad
    fails(
        NonFiniteError,
        rf"'{name}' must be finite, but 1 of \d+ values.*load a good checkpoint",
        model=model,
        before=True,
    )


def test_what_is_no_module(fails: Fails) -> None:
    fails(ConfigError, "expected a torch.nn.Module, got function", model=lambda x: x, before=True)


class Odd(nn.Module):
    """Changes what a good model returns."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x, self.inner(x))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda x, y: {"logits": y, "aux": x},
            r"dict with keys \['logits', 'aux'\].*declare one, e.g. Task\(output='log",
        ),
        (lambda x, y: (y, x), r"tuple of \['Tensor', 'Tensor'\].*Task\(output=0\)"),
        (lambda x, y: [y], r"list of \['Tensor'\].*Task\(output=0\)"),
        (lambda x, y: None, "a NoneType, expected one tensor"),
        (lambda x, y: y.tolist()[0][0], "a float, expected one tensor"),
    ],
    ids=["dict", "tuple", "list", "nothing", "number"],
)
def test_undeclared_outputs(fails: Fails, problem: Any, change: Any, match: str) -> None:
    fails(OutputError, match, model=Odd(problem.model(), change).eval(), before=True)


@pytest.mark.parametrize(
    ("change", "output", "match"),
    [
        (lambda x, y: {"logits": y}, "scores", r"Task\(output='scores'\) is not in .*\['logits'\]"),
        (lambda x, y: (y,), 1, r"Task\(output=1\) is not in .* has \[0\]"),
        (lambda x, y: {"logits": [y]}, "logits", "output 'logits' must be a tensor, got list"),
        (lambda x, y: y, "logits", r"Task\(output='logits'\) is declared, but the model returns one tensor"),
    ],
    ids=["wrong key", "wrong index", "no tensor", "one tensor"],
)
def test_wrongly_declared_outputs(fails: Fails, problem: Any, change: Any, output: Any, match: str) -> None:
    model, task = Odd(problem.model(), change).eval(), problem.small_task(output=output)
    fails(OutputError, match, model=model, task=task, before=True)


@pytest.mark.parametrize("change", [lambda x, y: y.mean(), lambda x, y: y[:1], lambda x, y: y.mean(0)])
def test_outputs_without_the_batch_first(fails: Fails, problem: Any, change: Any) -> None:
    fails(ModelError, "must have the batch as first dimension", model=Odd(problem.model(), change).eval(), before=True)


def test_a_model_that_does_not_take_the_data(fails: Fails) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(63, 4)).eval()
    fails(
        ModelError, r"does not run on the task's first examples 0: \(2, 1, 8, 8\): .*shapes", model=model, before=True
    )


def test_outputs_that_are_not_finite_at_once(fails: Fails, problem: Any) -> None:
    model = Odd(problem.model(), lambda x, y: y / 0).eval()
    fails(NonFiniteError, "output on the first examples has NaN or Inf", model=model, before=True)


@pytest.mark.parametrize(("role", "where"), [("certify", "split 'certify', batch 0"), ("report", "split 'report'")])
def test_outputs_that_are_not_finite_somewhere(fails: Fails, problem: Any, role: str, where: str) -> None:
    x, y = problem.small_splits()[role]
    task = problem.small_task(**{role: (with_value(x, 7, 12345.0), y)})
    model = Odd(problem.model(), lambda x, y: torch.where((x == 12345).any(), math.nan, y)).eval()
    fails(NonFiniteError, f"{where}.*NaN or Inf.*check its weights and this batch", model=model, task=task)


def test_a_model_that_cannot_be_copied(fails: Fails, problem: Any) -> None:
    model = problem.model()
    model.lock = threading.Lock()
    fails(ModelError, "cannot be copied .*remove hooks, graphs and open files", model=model, before=True)


class Unsendable(nn.Linear):
    """Can be copied, but not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unsendable:
        twin = Unsendable(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("holds a handle")


def test_a_model_that_cannot_be_sent_to_a_measuring_process(
    fails: Fails, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.pipeline.measuring.latency", latency)  # the real one
    model = nn.Sequential(nn.Flatten(), Unsendable(64, 4)).eval()
    fails(MeasurementError, r"'eager' cannot be sent to a measuring process .*holds a handle", model=model)


# --- data


@pytest.mark.parametrize("bad", BAD)
def test_first_inputs_that_are_not_finite(fails: Fails, problem: Any, bad: float) -> None:
    x, y = problem.small_splits()["train"]
    task = problem.small_task(calibrate=(with_value(x, 0, bad), y))
    fails(NonFiniteError, "input '0' of the first examples must be finite, but 1 of 128", task=task, before=True)


@pytest.mark.parametrize("bad", BAD)
def test_calibration_inputs_that_are_not_finite(fails: Fails, problem: Any, bad: float) -> None:
    x, y = problem.small_splits()["train"]
    task = problem.small_task(calibrate=(with_value(x, 77, bad), y))
    recipe = tersor.Recipe([Static(batch_size=25)])
    fails(NonFiniteError, "'0' of calibration batch 3 .*clean the data", task=task, target=ONNX, recipe=recipe)


def test_training_inputs_that_are_not_finite(fails: Fails, problem: Any) -> None:
    x, y = problem.small_splits()["train"]
    splits = problem.small_splits() | {
        "train": (with_value(x, 7, math.nan), y),
        "calibrate": (x[50:150] + 0.5, y[50:150]),
    }
    fails(NonFiniteError, r"training batch \d of epoch 0 must be finite", task=tersor.Task(**splits), recipe=TRAINING)


@pytest.mark.parametrize("role", ["train", "calibrate", "certify", "report"])
def test_empty_splits(problem: Any, role: str) -> None:
    x, y = problem.images()
    with pytest.raises(DataError, match=f"split '{role}' is empty; give it examples or leave it out"):
        problem.small_task(**{role: (x[:0], y[:0])})


def test_no_splits_at_all() -> None:
    with pytest.raises(DataError, match="at least one split"):
        tersor.Task()


def test_splits_that_overlap(problem: Any) -> None:
    x, y = problem.images()
    with pytest.raises(OverlapError, match="'train' and 'certify' share 10 example"):
        tersor.Task(train=(x[:100], y[:100]), certify=(x[90:300], y[90:300]))


@pytest.mark.parametrize(("max_drop", "confidence", "needed"), [(0.01, 0.95, 309), (0.02, 0.95, 154)])
def test_certify_splits_that_are_too_small(
    fails: Fails, problem: Any, max_drop: float, confidence: float, needed: int
) -> None:
    x, y = problem.images()
    budget = tersor.Budget(max_drop=max_drop, confidence=confidence, rounds=1)
    task = problem.small_task(certify=(x[600 : 600 + needed - 1], y[600 : 600 + needed - 1]))
    message = fails(
        SplitTooSmallError, f"has {needed - 1} examples.*at least {needed} are", task=task, budget=budget, before=True
    )
    assert "Budget(max_drop=None)" in message
    task = problem.small_task(certify=(x[600 : 600 + needed], y[600 : 600 + needed]))
    result = tersor.compress(problem.model(), task, out=fails.out, budget=budget, target=EAGER, recipe="convert")
    assert result.certified  # and with one example more it is possible


def test_confidence_that_resampling_cannot_tell(fails: Fails, problem: Any) -> None:
    budget = tersor.Budget(max_drop=0.05, confidence=0.9999, rounds=1)
    task = problem.small_task(metric="f1")
    fails(ConfigError, "'?f1'? is certified by resampling.*0.9999; ask", task=task, budget=budget, before=True)


def test_certify_splits_that_are_too_small_to_resample(fails: Fails, problem: Any) -> None:
    x, y = problem.images()
    task = problem.small_task(certify=(x[600:699], y[600:699]), metric="f1")
    fails(SplitTooSmallError, "has 99 examples.*at least 100", task=task, before=True)


@pytest.mark.parametrize(
    ("missing", "recipe", "target", "match"),
    [
        ("certify", "convert", EAGER, "a budget with max_drop needs a 'certify' split, but the task has only"),
        ("train", TRAINING, EAGER, "recover needs a 'train' split"),
        ("calibrate", "int8", ONNX, "quantize.static needs a 'calibrate' split"),
    ],
)
def test_splits_that_are_missing(
    fails: Fails, problem: Any, missing: str, recipe: Any, target: tersor.Target, match: str
) -> None:
    splits = problem.small_splits()
    splits = {role: data for role, data in splits.items() if role not in (missing, "train")}
    fails(DataError, match, task=tersor.Task(**splits), recipe=recipe, target=target, before=True)


@pytest.mark.parametrize("wrong", [4, -1, 1000])
@pytest.mark.parametrize("role", ["certify", "report"])
def test_labels_out_of_range(fails: Fails, problem: Any, role: str, wrong: int) -> None:
    x, y = problem.small_splits()[role]
    labels = y.clone()
    labels[5] = wrong
    task = problem.small_task(**{role: (x, labels)})
    fails(DataError, rf"split '{role}', batch 0: labels must be in 0\.\.3 .*got {wrong} at position 5", task=task)


@pytest.mark.parametrize("wrong", [4, -1])
def test_training_labels_out_of_range(fails: Fails, problem: Any, wrong: int) -> None:
    x, y = problem.small_splits()["train"]
    labels = y.clone()
    labels[5] = wrong
    task = problem.small_task(train=(x, labels))
    fails(DataError, rf"training labels must be in 0\.\.3, got {wrong}", task=task, recipe=TRAINING)


class Files(Dataset[Any]):
    """Examples that are read from files, one of which is gone."""

    def __init__(self, tensors: tuple[Tensor, Tensor], error: OSError) -> None:
        self.tensors = tensors
        self.error = error
        self.armed = False

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        if self.armed and index == 30:
            raise self.error
        return self.tensors[0][index], self.tensors[1][index]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/data/30.png"),
        PermissionError(13, "Permission denied", "/data/30.png"),
        OSError("cannot identify image file"),  # what Pillow raises
    ],
    ids=["missing", "forbidden", "broken"],
)
def test_data_that_cannot_be_read_is_not_blamed_on_the_output(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    data = Files(problem.small_splits()["certify"], error)
    task = problem.small_task(certify=data)
    assert task.splits["certify"].fingerprint
    out = tmp_path / "run"

    def arm(*args: Any, **kwargs: Any) -> Any:
        data.armed = True
        return export(*args, **kwargs)

    export = Eager.export
    monkeypatch.setattr(Eager, "export", arm)
    with pytest.raises(OSError, match=r"30\.png|cannot identify") as caught:
        tersor.compress(problem.model(), task, out=out, budget=BUDGET, target=EAGER, recipe="convert")
    assert caught.value is error
    assert [path.name for path in out.iterdir()] == ["run.json"]


# --- metrics and budgets


@pytest.mark.parametrize("value", BAD)
def test_metrics_that_are_not_finite(fails: Fails, problem: Any, value: float) -> None:
    def odd(outputs: Tensor, labels: Tensor) -> float:
        return value

    fails(
        NonFiniteError,
        r"metric 'odd' returned (nan|inf|-inf) .*check the model's outputs and the metric",
        task=problem.small_task(metric=odd),
    )


def test_metrics_that_are_not_finite_on_a_resample(fails: Fails, problem: Any) -> None:
    def fragile(outputs: Tensor, labels: Tensor) -> float:
        return 1.0 if len(torch.unique(labels.view(-1), return_counts=True)[1].unique()) < 4 else math.nan

    fails(NonFiniteError, "bootstrap draw", task=problem.small_task(metric=fragile))


def test_budgets_beyond_the_metric(fails: Fails) -> None:
    message = fails(ConfigError, "max_drop", budget=tersor.Budget(max_drop=2.0, rounds=1), before=True)
    assert "0.01 = one point" in message


@pytest.mark.parametrize("confidence", [0.9999999, 1 - 1e-9])
def test_confidence_that_no_data_can_give(fails: Fails, confidence: float) -> None:
    budget = tersor.Budget(max_drop=0.05, confidence=confidence)
    fails(ConfigError, "no number of examples could certify this", budget=budget, before=True)


# --- targets


def test_a_runtime_that_is_not_installed(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    fails(
        RuntimeUnavailableError, r"'openvino' needs the package 'openvino'.*pip install 'tersor\[openvino\]'",
        target=tersor.Target("openvino", threads=1), recipe="int8", before=True,
    )  # fmt: skip


def test_a_runtime_that_does_not_exist(fails: Fails) -> None:
    fails(
        ConfigError, r"expected one of \['eager', .*got 'tensorflow'", target=tersor.Target("tensorflow"), before=True
    )


def test_a_step_that_the_runtime_cannot_run(fails: Fails) -> None:
    fails(UnsupportedError, "quantize.static produces int8, but runtime 'eager' runs only", recipe="int8", before=True)


@pytest.mark.parametrize("recipe", ["int9", "missing.yaml", Path("missing.yaml")])
def test_a_recipe_that_does_not_exist(fails: Fails, recipe: str | Path) -> None:
    fails(ConfigError, "int9|does not exist", recipe=recipe, before=True)


# --- disks


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def check_goes_on(problem: Any, disk: Path, target: tersor.Target, recipe: Any, expected_stages: int = 0) -> None:
    """With room again, the same call finishes."""
    result = tersor.compress(
        problem.model(), problem.small_task(), out=disk / "run", budget=BUDGET, target=target, recipe=recipe
    )
    verify(result.artifact)
    assert result.report.certificate is not None
    assert result.report.certificate.times_asked == 1
    assert files(disk / "run" / "stages")[:expected_stages] == [
        f"{n + 1:02d}.safetensors" for n in range(expected_stages)
    ]


@pytest.mark.parametrize(
    ("kilobytes", "filled", "target", "recipe", "left"),
    [
        (16, 16, EAGER, "convert", []),
        (240, 0, EAGER, tersor.Recipe(TRAINING.steps[:1]), ["run.json", "stages"]),
        (400, 0, EAGER, TRAINING, ["run.json", "stages", "stages/01.safetensors", "work", "work/02"]),
        (120, 0, EAGER, "convert", ["run.json"]),
        pytest.param(120, 0, ONNX, "convert", ["run.json"], marks=pytest.mark.slow),
        pytest.param(120, 0, OPENVINO, "convert", ["run.json"], marks=pytest.mark.slow),
        (284, 0, EAGER, "convert", ["run.json"]),
        (320, 0, EAGER, "convert", ["run.json"]),
    ],
    ids=["run.json", "first step", "second step", "eager model", "onnx model", "openvino model", "ledger", "page"],
)
def test_a_full_disk(
    problem: Any, small_disk: Callable[..., Path], noticed: Any, kilobytes: int, filled: int, target: tersor.Target,
    recipe: Any, left: list[str],
) -> None:  # fmt: skip
    disk, model = small_disk(kilobytes), problem.model()
    before = noticed(model)
    (disk / "filler").write_bytes(b"x" * 1024 * filled)
    with pytest.raises(OutputDirectoryError, match=r"No space left|is the disk full") as caught:
        tersor.compress(model, problem.small_task(), out=disk / "run", budget=BUDGET, target=target, recipe=recipe)
    assert str(disk) in str(caught.value)
    assert "Free space or choose another" in str(caught.value)
    assert files(disk / "run") == left
    assert noticed(model) == before
    (disk / "filler").unlink()
    small_disk(4000)
    check_goes_on(problem, disk, target, recipe)


def test_a_read_only_disk(fails: Fails, problem: Any, small_disk: Callable[..., Path]) -> None:
    disk = small_disk(4000)
    small_disk(4000, "ro")
    fails(OutputDirectoryError, "Read-only file system.*choose another", out=disk / "run")
    assert files(disk) == []
    small_disk(4000, "rw")
    check_goes_on(problem, disk, EAGER, "convert")


def test_a_disk_that_becomes_read_only(
    problem: Any, small_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(4000)

    def fail(*args: Any) -> Any:
        small_disk(4000, "ro")
        return render_html(*args)

    monkeypatch.setattr(sys.modules["tersor.pipeline.documents"], "render_html", fail)
    with pytest.raises(OutputDirectoryError, match="Read-only file system"):
        tersor.compress(
            problem.model(), problem.small_task(), out=disk / "run", budget=BUDGET, target=EAGER, recipe="convert"
        )
    assert not (disk / "run" / "artifact").exists()
    monkeypatch.undo()
    small_disk(4000, "rw")
    check_goes_on(problem, disk, EAGER, "convert")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the read-only disks above stand for it")
def test_a_directory_without_the_right_to_write(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    fails(OutputDirectoryError, "Permission denied", out=tmp_path / "locked" / "run")


# --- hostile files


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("form", ["pickle", "torch", "state dict", "jit"])
def test_a_weights_file_that_wants_to_run_code(problem: Any, tmp_path: Path, form: str) -> None:
    file, trace = tmp_path / "weights.pt", tmp_path / "executed"
    state = problem.net.state_dict()
    if form == "pickle":
        file.write_bytes(pickle.dumps(Hostile(trace)))
    elif form == "torch":
        torch.save(Hostile(trace), file)
    elif form == "state dict":
        torch.save({**state, "extra": Hostile(trace)}, file)
    else:
        file.write_bytes(b"PK\x03\x04" + b"\x00" * 100)
    with pytest.raises(ArtifactError, match=r"weights.pt is damaged or holds more than weights .*safetensors"):
        load_model_from(problem, file)
    assert not trace.exists()


def test_a_weights_file_of_plain_tensors_is_fine(problem: Any, tmp_path: Path) -> None:
    torch.save(problem.net.state_dict(), tmp_path / "weights.pt")
    model = load_model_from(problem, tmp_path / "weights.pt")
    for name, value in problem.net.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ({"weight": torch.zeros(2)}, ModelError, "do not fit Sequential: .*Missing key"),
        ([1, 2], ArtifactError, "must hold a state dict"),
        ({"weight": 3}, ArtifactError, "must hold a state dict"),
    ],
)
def test_weights_that_do_not_fit(
    problem: Any, tmp_path: Path, content: Any, error: type[Exception], match: str
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(error, match=match):
        load_model_from(problem, tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_safetensors_that_are_damaged(problem: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises((ArtifactError, ModelError), match=r"damaged|do not fit"):
        load_model_from(problem, tmp_path / "weights.safetensors")


def load_model_from(problem: Any, weights: Path) -> nn.Module:
    """What `tersor compress --model problem:build --weights FILE` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "problem", problem.module)
        return load_candidate("problem:build", weights).module


def test_the_caller_may_go_on_after_an_error(problem: Any, tmp_path: Path) -> None:
    """A failure leaves nothing behind in the process either."""
    threads, state = torch.get_num_threads(), copy.deepcopy(np.random.get_state()[1])
    x, y = problem.small_splits()["train"]
    task = problem.small_task(train=(x, torch.full_like(y, 9)))
    with pytest.raises(DataError):
        tersor.compress(problem.model(), task, out=tmp_path / "run", budget=BUDGET, target=EAGER, recipe=TRAINING)
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert (np.random.get_state()[1] == state).all()
