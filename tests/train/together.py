"""Trainings that one process or several do alike; each leaves facts for the test to compare.

`torchrun together.py DIRECTORY JOB...` writes the facts of every process to `DIRECTORY/<rank>.pt`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.candidate import apply_masks
from tersor.core.split import Split
from tersor.errors import ConfigError, NonFiniteError
from tersor.train import Checkpoints, Hooks, Schedule, fit

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(96, 6)
Y = (X[:, 0] + X[:, 1] > 0).long()
SPLIT = Split("train", (X, Y))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.outer(functional.gelu(self.inner(hidden)))


class Net(nn.Module):
    """Repeated blocks between two layers, and a head that the task does not use; rows of 7 do not split evenly."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(7) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head, self.unused = nn.Linear(7, 2), nn.Linear(7, 3)

    def features(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.stem(x))
        for block in self.blocks:
            hidden = block(hidden)
        return self.dropout(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def net(seed: int = 1, **options: Any) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**options)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(batch.call(module), batch.labels)


def facts(module: nn.Module, trained: Any, **others: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "losses": trained.losses,
        "steps": trained.steps,
        "metrics": trained.metrics,
        "clean": clean(module),
        **others,
    }


def clean(module: nn.Module) -> bool:
    """Whether nothing is left of having trained in several processes, so that it can be copied, hooked and trained."""
    plain = all(
        type(part).__module__ in (__name__, "__main__") or "torch.nn" in type(part).__module__
        for part in module.modules()
    )
    hooks = any(
        part._forward_hooks or part._forward_pre_hooks or part._state_dict_pre_hooks for part in module.modules()
    )
    return plain and not hooks and all(type(value) is nn.Parameter for value in module.parameters())


def schedule(**fields: Any) -> Schedule:
    return Schedule(**{"epochs": 2, "batch_size": 24, "lr": 0.1, **fields})


def train(module: nn.Module | None = None, hooks: Hooks | None = None, loss: Any = cross_entropy, **fields: Any) -> Any:
    module = module or net()
    return facts(module, fit(module, SPLIT, loss, schedule=schedule(**fields), seed=3, hooks=hooks))


def twice(module: nn.Module, batch: Batch) -> Tensor:
    """Calls the module two times for one loss."""
    first, second = batch.call(module), module(batch.args[0] * 0.9)
    return functional.cross_entropy(first, batch.labels) + (first - second).square().mean()


def companions(**fields: Any) -> Any:
    """A projector learns along with the features."""
    wanted = torch.tanh(X @ normal(6, 5, seed=4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        projector = nn.Linear(7, 5)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        caught: list[Tensor] = []
        handle = module.dropout.register_forward_hook(lambda m, args, output: caught.append(output))
        value = cross_entropy(module, batch)
        handle.remove()
        assert batch.positions is not None
        return value + (projector(caught[0]) - wanted[batch.positions]).square().mean()

    found = train(loss=loss, hooks=Hooks(companions=(projector,)), **fields)
    return {**found, "projector": projector.state_dict(), "clean": found["clean"] and clean(projector)}


def masked(**fields: Any) -> Any:
    """Masks hold after every step, on the very parameters that the caller knows."""
    module = net()
    kept = {f"blocks.{index}.inner.weight": normal(14, 7, seed=index) > 0 for index in range(3)}
    apply_masks(module, kept)
    known = module.get_parameter("blocks.1.inner.weight")
    found = train(module, Hooks(after_step=lambda: apply_masks(module, kept)), **fields)
    same = known is module.get_parameter("blocks.1.inner.weight")
    holds = all(bool((module.get_parameter(path)[~mask] == 0).all()) for path, mask in kept.items())
    return {**found, "same": same, "holds": holds}


def averaged(**fields: Any) -> Any:
    """Exponential averages, BatchNorm, dropout, patience, accumulation, what is random in hooks, and who tells what."""
    told: list[int] = []
    module = net(norm=True, dropout=0.2)

    def evaluate(trained: nn.Module) -> float:
        assert not trained.training
        return float((trained(X).argmax(1) == Y).double().mean())

    def noisy() -> None:
        with torch.no_grad():
            module.get_parameter("unused.bias").add_(torch.randn(3))

    hooks = Hooks(after_step=noisy, evaluate=evaluate, progress=lambda done, total, facts: told.append(done))
    found = train(module, hooks, ema=0.8, patience=2, accumulate=2, clip_norm=0.5, optimizer="adamw", lr=0.02, **fields)
    return {**found, "told": len(told)}


def gradual(**fields: Any) -> Any:
    """Masks that grow by a criterion which reads activations, on a net with BatchNorm."""
    from tersor.prune.gradual import Training, gradual
    from tersor.prune.sparsity import Sparsity

    module = net(norm=True)
    settings = Sparsity(amount=0.6, criterion="l1")
    grown = gradual(module, Training(SPLIT, cross_entropy, schedule(epochs=4, **fields), 3), settings)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "masks": grown.masks,
        "losses": grown.trace,
    }


def recover(**fields: Any) -> Any:
    """A student comes closer to its teacher."""
    from tersor.core.candidate import Candidate, frozen_copy
    from tersor.core.context import Context
    from tersor.core.target import Target
    from tersor.core.task import Task
    from tersor.distill import Recover

    teacher, student = frozen_copy(net(1)), net(2)
    context = Context(Task(train=(X, Y)), Target(), teacher)
    before = float((student(X) - teacher(X)).detach().square().mean())
    done = Recover(schedule=schedule(epochs=10, **fields)).apply(Candidate(student), context).module
    after = float((done(X) - teacher(X)).detach().square().mean())
    return {"weights": done.state_dict(), "before": before, "after": after}


def uneven(**fields: Any) -> Any:
    """Batches of 20, 20, 20, 20 and 16 of 96 examples in two trainings one after the other, on one module."""
    module = net()
    train(module, batch_size=20, **fields)
    return train(module, batch_size=20, **fields)


def nan() -> Any:
    """One process alone meets a loss that is no number; all are told, and can train again."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        value = cross_entropy(module, batch)
        return value * float("nan") if RANK == SIZE - 1 else value

    errors = []
    for fields in ({}, {"parallel": "sharded"}):
        module = net()
        try:
            train(module, loss=loss, **fields)
        except NonFiniteError as error:
            errors.append(str(error))
        assert clean(module)
    return {"errors": errors}


def disagreeing() -> Any:
    """Processes that mean to train different things are told so."""
    errors = []
    for module, fields in ((net(), {"lr": 0.1 + RANK}), (net(norm=RANK == 1), {}), (net(seed=RANK), {})):
        try:
            errors.append(train(module, **fields)["weights"]["stem.weight"])
        except ConfigError as error:
            errors.append(str(error))
    return {"errors": errors[:2], "stem": errors[2]}


def refused() -> Any:
    """What does not go together with shared weights is said before work."""
    errors = []
    for fields in ({"compile": True}, {"channels_last": True}):
        try:
            train(parallel="sharded", **fields)
        except ConfigError as error:
            errors.append(str(error))
    module = net()
    freeze = Hooks(before_step=lambda step, total: module.head.requires_grad_(False) and None)
    try:
        train(module, freeze, parallel="sharded")
    except ConfigError as error:
        errors.append(str(error))
    scalar = net()
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    try:
        train(scalar, parallel="sharded")
    except ConfigError as error:
        errors.append(str(error))
    return {
        "errors": errors,
        "clean": clean(module) and clean(scalar),
        "start": torch.equal(net().stem.weight, module.stem.weight),
    }


class Counter:
    """Something with a state that differs between processes."""

    def __init__(self) -> None:
        self.value = RANK * 100

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def kept(directory: Path, *, die: int | None = None, still: bool = False, **fields: Any) -> Any:
    """A training with checkpoints; at first, the last process may be killed by the hardest signal after some steps."""
    module, counter, done = net(norm=not still, dropout=0.0 if still else 0.2), Counter(), 0
    fresh = not (directory / "training.pt").exists()

    def after_step() -> None:
        nonlocal done
        counter.value += 1
        done += 1
        if fresh and done == die and RANK == SIZE - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    hooks = Hooks(after_step=after_step, stateful={"counter": counter})
    settings = schedule(ema=0.9, optimizer="adamw", lr=0.02, clip_norm=1.0, **fields)
    keep = Checkpoints(directory, every_steps=3)
    found = facts(module, fit(module, SPLIT, cross_entropy, schedule=settings, seed=3, hooks=hooks, keep=keep))
    return {**found, "counter": counter.value, "done": done}


def held(**fields: Any) -> Any:
    """The share of the blocks' weights that this process has at the start of a forward pass."""
    shares = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.blocks.parameters()]
        shares.append(sum(part.numel() for part in parts) / sum(p.numel() for p in net().blocks.parameters()))
        return cross_entropy(module, batch)

    train(loss=loss, **fields)
    return {"share": max(shares)}


def own() -> Any:
    """A group of processes that the caller made is left alone."""
    distributed.init_process_group("gloo")
    found = train()
    still = distributed.is_initialized()
    distributed.destroy_process_group()
    return {**found, "still": still}


JOBS: dict[str, Callable[..., Any]] = {
    "plain": train,
    "plain_accumulated": lambda **fields: train(accumulate=2, **fields),
    "clipped_adamw": lambda **fields: train(clip_norm=0.1, optimizer="adamw", lr=0.01, **fields),
    "twice": lambda **fields: train(loss=twice, **fields),
    "twice_accumulated": lambda **fields: train(loss=twice, accumulate=4, **fields),
    "companions": companions,
    "masked": masked,
    "averaged": averaged,
    "gradual": gradual,
    "recover": recover,
    "uneven": uneven,
    "held": held,
    "own": own,
    "nan": nan,
    "disagreeing": disagreeing,
    "refused": refused,
}


def run(jobs: list[str], directory: Path) -> dict[str, Any]:
    """The facts of each job: `name`, `sharded:name`, or `kept:5` for one with checkpoints that is killed at step 5.

    What stands behind a `#` only tells one run from another.
    """
    found = {}
    for job in jobs:
        how, _, name = job.rpartition(":")
        fields: dict[str, Any] = {"parallel": "sharded"} if "sharded" in how else {}
        if how.startswith("kept"):
            found[job] = kept(directory / how, die=int(name), still="still" in how, **fields)
        else:
            found[job] = JOBS[name.partition("#")[0]](**fields)
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1])
    result = run(sys.argv[2:], out)
    torch.save(result, out / f"{RANK}.pt")
