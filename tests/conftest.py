"""A small image problem that is solved in a second, a trained network for it, and the rule for shared data."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.core.batch import Batch
from tersor.measure.latency import Contestant, Measured, Protocol, summarise

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
THREADS = 1  # more would fight over the cores with whoever else runs here, and waiting threads spin

# The problem as a module of its own: tests import it, child processes and the command line do too. The network is
# made of PyTorch's own classes only, so that a measuring process needs nothing from the tests.
PROBLEM = '''
from pathlib import Path

import tersor
import torch
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).parent
CLASSES = 4
torch.set_num_threads(1)


def build():
    """Three convolutions and a linear layer, 69,000 parameters, on images `[B, 1, 8, 8]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES),
        )


def trained():
    net = build()
    net.load_state_dict(load_file(HERE / "weights.safetensors"))
    return net.eval()


def images():
    """Four patterns under noise: 2,000 images and their labels."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=generator)
    labels = torch.arange(2000) % CLASSES
    return patterns[labels] + 0.8 * torch.randn(2000, 1, 8, 8, generator=generator), labels


def splits():
    x, y = images()
    return {"train": (x[:600], y[:600]), "certify": (x[600:1600], y[600:1600]), "report": (x[1600:], y[1600:])}


def small_splits():
    x, y = images()
    return {"train": (x[:200], y[:200]), "certify": (x[600:800], y[600:800]), "report": (x[1600:1650], y[1600:1650])}


def task(**fields):
    return tersor.Task(**(splits() | {"class_names": ("a", "b", "c", "d")} | fields))


def small_task(**fields):
    return task(**(small_splits() | fields))
'''


@dataclass(frozen=True)
class Problem:
    """The problem, its trained network, and where the module and the weights lie for other processes."""

    directory: Path
    module: ModuleType
    net: nn.Module

    def model(self) -> nn.Module:
        """A copy of the trained network that a test may do anything to."""
        return copy.deepcopy(self.net)

    def images(self) -> tuple[Tensor, Tensor]:
        """All images and labels."""
        found: tuple[Tensor, Tensor] = self.module.images()
        return found

    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """600 to train, 1,000 to certify, 400 to report."""
        found: dict[str, tuple[Tensor, Tensor]] = self.module.splits()
        return found

    def task(self, **fields: Any) -> tersor.Task:
        """The task, with some fields changed."""
        found: tersor.Task = self.module.task(**fields)
        return found

    def small_splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """200 to train, 200 to certify, 50 to report."""
        found: dict[str, tuple[Tensor, Tensor]] = self.module.small_splits()
        return found

    def small_task(self, **fields: Any) -> tersor.Task:
        """A smaller task, enough to certify five points."""
        found: tersor.Task = self.module.small_task(**fields)
        return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    reason = pytest.mark.skip(reason=f"needs the real data and weights in {SHARED}, which is not there")
    for item in items:
        if item.get_closest_marker("shared") is not None:
            item.add_marker(reason)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks on busy cores: one thread is the fastest, and the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data and weights; only tests marked `shared` may use it."""
    return SHARED


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """The problem, solved."""
    directory = tmp_path_factory.mktemp("problem")
    file = directory / "problem.py"
    file.write_text(PROBLEM)
    spec = importlib.util.spec_from_file_location("problem", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.build().train()
    x, y = module.splits()["train"]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for chosen in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    net.eval().zero_grad()
    save_file(net.state_dict(), directory / "weights.safetensors")
    x, y = module.splits()["report"]
    assert (net(x).argmax(1) == y).double().mean() > 0.9, "the problem was not learned; nothing below means anything"
    return Problem(directory, module, net)


def everything_about(model: nn.Module) -> str:
    """Hash of all that a caller could notice: weights, buffers, gradients, modes, flags, hooks."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        gradient = None if tensor.grad is None else tensor.grad.numpy().tobytes()
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, id(tensor))).encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes() + (gradient or b"none"))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        digest.update(repr((name, type(module).__name__, module.training, hooks, id(module))).encode())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def noticed() -> Callable[[nn.Module], str]:
    """`everything_about`."""
    return everything_about


def in_this_process(
    contestants: Mapping[str, Contestant],
    batch: Batch,
    *,
    threads: int,
    protocol: Protocol | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:
    """Stands in for `latency`: loads and calls every contestant once, and invents the times."""
    rounds = (protocol or Protocol()).rounds
    found = {}
    for position, (name, contestant) in enumerate(contestants.items()):
        batch.call(contestant.factory())
        found[name] = Measured(summarise([[0.003 - 0.001 * position] * 5] * rounds), 1_000_000)
    return found


@contextmanager
def without_timing() -> Iterator[None]:
    """Runs whose times do not matter take seconds less: three processes need not start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.pipeline.measuring.latency", in_this_process)
        yield


@pytest.fixture(scope="session")
def untimed() -> Callable[[], AbstractContextManager[None]]:
    """`without_timing`, for fixtures that outlive a test."""
    return without_timing


@pytest.fixture
def quick_latency() -> Iterator[None]:
    """`without_timing`, for one test."""
    with without_timing():
        yield


@pytest.fixture(scope="session")
def deployed(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tersor.Result]:
    """Whole runs, each made once: `deployed("onnxruntime", "int8")`; those of OpenVINO are timed."""

    @cache
    def run(runtime: str, recipe: str) -> tersor.Result:
        with nullcontext() if runtime == "openvino" else without_timing():
            return tersor.compress(
                problem.model(),
                problem.task(preprocessing="noise over a pattern"),
                out=tmp_path_factory.mktemp(f"{runtime}-{recipe}") / "run",
                budget=tersor.Budget(max_drop=0.02, rounds=1),
                target=tersor.Target(runtime, threads=THREADS),
                recipe=recipe,
            )

    return run


def run_python(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter, with its text as `-c`, and shows what it said if it fails."""
    command = [sys.executable, "-c", script, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603 - our script
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def fresh_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python`."""
    return run_python


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of some kilobytes, `small_disk(200)`, or remounts it read-only; skips where it cannot."""
    mounted: list[Path] = []

    def mount(kilobytes: int, *options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        wanted = ",".join([f"size={kilobytes}k", "mode=755", *options, *(["remount"] if mounted else [])])
        command = ["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        if done.returncode != 0:
            pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs Linux and root, to mount a small file system")
    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(mounted[0])], check=True)  # noqa: S603, S607 - fixed words
