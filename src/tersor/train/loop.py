"""The training loop: it is handed a loss and hooks and knows nothing about methods."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn as moving

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.errors import NonFiniteError
from tersor.train.batches import StepBatches
from tersor.train.checkpoint import Checkpoints, Keeper, fingerprint_of
from tersor.train.hooks import BatchLoss, Hooks
from tersor.train.parallel import World, join
from tersor.train.placement import device_of, moved, placed
from tersor.train.randomness import callers_kept, seed_all
from tersor.train.schedule import Schedule

Weights = dict[str, Tensor]


@dataclass
class Trained:
    """What a training did.

    Attributes:
        losses: Mean loss of each epoch.
        metrics: The metric on the search split after each epoch, if one is evaluated.
        steps: Optimizer steps, with those before an interruption.
        best_epoch: The epoch whose weights the module has, if training may end early; else the last.
        examples_per_second: Of this process since training began or was resumed; NaN if nothing was left to do.
    """

    losses: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    steps: int = 0
    best_epoch: int | None = None
    examples_per_second: float = math.nan


def fit(
    module: nn.Module,
    split: Split,
    loss: BatchLoss,
    *,
    schedule: Schedule,
    seed: int,
    hooks: Hooks | None = None,
    keep: Checkpoints | None = None,
) -> Trained:
    """Trains `module` in place and leaves it in evaluation mode.

    The result is the last step's, or, with `patience`, that of the best epoch on the search split. The same seed gives
    the same weights, bit for bit, on the same machine, also when the training was killed and goes on from a checkpoint,
    and however many processes load data. Started by `torchrun`, the processes share every batch.

    Args:
        module: Trained in place.
        split: The training examples.
        loss: `(module, batch) -> scalar`, a mean over the batch.
        schedule: Epochs, batch size, optimizer, learning rate, and how steps are computed.
        seed: Fixes the order of the examples and everything random in model and data.
        hooks: Functions to call on the way.
        keep: Where checkpoints are kept; if one is there, training goes on from it.

    Raises:
        NonFiniteError: if the loss becomes NaN or Inf, naming epoch and step; the last checkpoint stays.
        ConfigError: if the schedule does not fit machine or data.
        DistributedError: if another process is lost.
        OutputDirectoryError, IntegrityError: if the checkpoint is of another training, or damaged.
    """
    hooks = hooks or Hooks()
    device = device_of(module, schedule)
    world = join(device)
    with callers_kept(device), torch.enable_grad(), placed([module, *hooks.companions], schedule, device):
        training = _Training(module, split, loss, schedule, seed, hooks, world)
        keeper = None
        if keep is not None:
            facts = (seed, len(split), keep.identity)
            keeper = Keeper(keep, fingerprint_of(training.objective, schedule, *facts))
        with world.watched():
            training.run(keeper)
        module.eval()
        if hooks.finish is not None:
            with torch.no_grad():
                hooks.finish(module)
    return training.done


class _Objective(nn.Module):
    """Everything that trains, with the loss as its forward pass: what is wrapped for several processes."""

    def __init__(self, module: nn.Module, companions: tuple[nn.Module, ...], loss: BatchLoss) -> None:
        super().__init__()
        self.module, self.companions = module, nn.ModuleList(companions)
        self._loss = (loss,)  # in a tuple, for a loss that is a module must not become part of this one

    def forward(self, batch: Batch) -> Tensor:
        """The loss of one batch."""
        return self._loss[0](self.module, batch)


class _Training:
    """One call of `fit`."""

    def __init__(
        self,
        module: nn.Module,
        split: Split,
        loss: BatchLoss,
        schedule: Schedule,
        seed: int,
        hooks: Hooks,
        world: World,
    ) -> None:
        self.module, self.schedule, self.seed, self.hooks, self.world = module, schedule, seed, hooks, world
        self.objective = _Objective(module, hooks.companions, loss)
        self.batches = StepBatches(split, schedule, seed, world)
        self.device = device_of(module, schedule)
        self.done = Trained()
        self.running: list[float] = []
        self.best: tuple[float, Weights] | None = None
        self.optimizer = schedule.optimizer_for(self.objective)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.precision == "float16")
        self.average: AveragedModel | None = None
        if schedule.ema is not None:
            self.average = AveragedModel(module, multi_avg_fn=moving(schedule.ema), use_buffers=True)  # type: ignore[no-untyped-call]
        self._started, self._examples = time.perf_counter(), 0

    def run(self, keeper: Keeper | None) -> None:
        """All epochs, or those that are left."""
        state = keeper.read() if keeper is not None else None
        if state is not None:
            self._load(state)
        self.objective.train()
        wrapped, per_epoch = self.world.wrap(self.objective), self.batches.steps
        self._started, first = time.perf_counter(), self.done.steps
        stopped = self._out_of_patience()
        for step, batch in enumerate(self.batches.loaded(first) if not stopped else (), start=first):
            self._step(wrapped, batch, step)
            if self.done.steps % per_epoch == 0:
                self._end_epoch()
                stopped = self._out_of_patience()
            finished = stopped or self.done.steps == len(self.batches)
            if keeper is not None and self.world.leads and (finished or keeper.due(self.done.steps)):
                keeper.write(self._state())
            if stopped:
                break
        self._finish()

    def _step(self, wrapped: nn.Module, batch: Batch, step: int) -> None:
        epoch, within = divmod(step, self.batches.steps)
        lr = self.schedule.learning_rate(step, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch.check_finite(f"training batch {within} of epoch {epoch}")
        batch = moved(batch, self.schedule, self.device)
        if self.hooks.before_step is not None:
            self.hooks.before_step(step, len(self.batches))
        seed_all(self.seed, "model", step, self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        value = self._backward(wrapped, batch)
        mean = self.world.mean([value], self.device)[0]
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the training loss became {mean} in epoch {epoch}, step {within} (learning rate {lr:.2g}); lower lr "
                "or set clip_norm" + _named(batch)
            )
        if self.schedule.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.schedule.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.hooks.after_step is not None:
            self.hooks.after_step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.running.append(mean)
        self.done.steps = step + 1
        self._examples += len(batch) * self.world.size
        self._tell(mean)

    def _backward(self, wrapped: nn.Module, batch: Batch) -> float:
        """Gradients of the batch, part by part; its loss."""
        size, parts = len(batch), min(self.schedule.accumulate, len(batch))
        bounds = [size * part // parts for part in range(parts + 1)]
        total = 0.0
        for part in range(parts):
            start, end = bounds[part], bounds[part + 1]
            piece = batch if parts == 1 else batch.map(lambda value, a=start, b=end: value[a:b])  # type: ignore[misc]
            last = part == parts - 1
            with self.world.accumulating(wrapped) if not last else _nothing():
                with self._autocast():
                    value: Tensor = wrapped(piece)
                share = value * ((end - start) / size) if parts > 1 else value
                self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            total += float(share.detach())
        return total

    def _autocast(self) -> torch.autocast:
        dtype = torch.bfloat16 if self.schedule.precision == "float32" else getattr(torch, self.schedule.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.schedule.precision != "float32")

    def _end_epoch(self) -> None:
        self.done.losses.append(sum(self.running) / len(self.running))
        self.running = []
        self.done.best_epoch = len(self.done.losses) - 1
        if self.hooks.evaluate is None:
            return
        with self._averaged():
            self.module.eval()
            with torch.no_grad():
                metric = self.hooks.evaluate(self.module)
            metric = self.world.mean([metric], self.device)[0]
            self.done.metrics.append(metric)
            if self.schedule.patience is not None and (self.best is None or metric > self.best[0]):
                self.best = metric, {name: value.clone() for name, value in self.module.state_dict().items()}
        self.objective.train()
        if self.schedule.patience is not None:
            self.done.best_epoch = self.done.metrics.index(max(self.done.metrics))
        self._tell(self.done.losses[-1])

    def _out_of_patience(self) -> bool:
        patience, metrics = self.schedule.patience, self.done.metrics
        if patience is None or not metrics:
            return False
        return len(metrics) - 1 - metrics.index(max(metrics)) >= patience

    def _finish(self) -> None:
        if self.best is not None:
            self.module.load_state_dict(self.best[1])
        elif self.average is not None:
            _copy(self.average.module, self.module)
        self.world.from_leader([*self.module.buffers()])
        elapsed = time.perf_counter() - self._started
        if self._examples:
            self.done.examples_per_second = self._examples / elapsed

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the module has the averaged weights, if there are such."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.module.state_dict().items()}
        _copy(self.average.module, self.module)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def _tell(self, loss: float) -> None:
        if self.hooks.progress is None or not self.world.leads:
            return
        facts = {"loss": loss, "examples/s": self._examples / max(time.perf_counter() - self._started, 1e-9)}
        if self.done.metrics:
            facts["metric"] = self.done.metrics[-1]
        self.hooks.progress(self.done.steps, len(self.batches), facts)

    def _state(self) -> dict[str, Any]:
        for name, tensor in self.objective.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name.removeprefix('module.')!r} became NaN or Inf within {self.done.steps} steps; lower lr or "
                    "set clip_norm. The checkpoint before stays"
                )
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": None if self.best is None else {"metric": self.best[0], "weights": self.best[1]},
            "done": asdict(self.done),
            "running": self.running,
            "stateful": {name: item.state_dict() for name, item in self.hooks.stateful.items()},
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["best"] is not None:
            self.best = state["best"]["metric"], state["best"]["weights"]
        self.done, self.running = Trained(**state["done"]), state["running"]
        for name, item in self.hooks.stateful.items():
            item.load_state_dict(state["stateful"][name])


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _named(batch: Batch) -> str:
    if batch.positions is None:
        return ""
    shown = batch.positions[:4].tolist()
    return f". The batch holds the examples {', '.join(map(str, shown))}, … of the split"
