"""The training loop: it is handed a loss and hooks and knows nothing about methods."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.errors import ConfigError, ModelError, NonFiniteError
from tersor.train.average import Average, tensors_of
from tersor.train.batches import StepBatches, named
from tersor.train.checkpoint import Checkpoints, Keeper, fingerprint_of
from tersor.train.hooks import BatchLoss, Hooks
from tersor.train.parallel import World, join
from tersor.train.placement import arithmetic, device_of, moved, placed
from tersor.train.randomness import callers_kept, seed_all
from tersor.train.schedule import Schedule
from tersor.train.strategy import Replicated, Strategy

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

    def told(self) -> list[str]:
        """For the report."""
        lines = [f"loss by epoch: {', '.join(f'{value:.4f}' for value in self.losses)}"]
        if self.metrics:
            lines.append(f"metric on the search split by epoch: {', '.join(f'{value:.4f}' for value in self.metrics)}")
        if self.best_epoch is not None and self.best_epoch + 1 < len(self.losses):
            lines.append(f"the weights are those of epoch {self.best_epoch + 1}, the best on the search split")
        return lines


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
    """Trains `module` in place and leaves it in evaluation mode, without gradients, where it was.

    The result is the last step's, or, with `patience`, that of the best epoch on the search split. The same seed gives
    the same weights, bit for bit, on the same machine, also when the training was killed and goes on from a checkpoint,
    and however many processes load data. Started by `torchrun`, the processes share every batch. An exception leaves
    the module with the weights that it has by then; `weights_of` reads those of the last checkpoint.

    Args:
        module: Trained in place.
        split: The training examples.
        loss: `(module, batch) -> scalar`, a mean over the batch.
        schedule: Epochs, batch size, optimizer, learning rate, and how steps are computed.
        seed: Fixes the order of the examples and everything random in model and data.
        hooks: Functions to call on the way.
        keep: Where checkpoints are kept; if one is there, training goes on from it.

    Raises:
        NonFiniteError: if loss, weights or metric become NaN or the loss Inf, naming epoch and step; the last
            checkpoint stays.
        ConfigError: if the schedule does not fit machine, hooks or data, or the loss is not one number.
        ModelError: if no parameter trains.
        DistributedError: if another process is lost.
        OutputDirectoryError, IntegrityError: if the checkpoint is of another training, or damaged.
    """
    hooks = hooks or Hooks()
    _check(module, schedule, seed, hooks)
    device = device_of(module, schedule)
    world = join(device)
    modules = [module, *hooks.companions]
    with callers_kept(device), _gradients(modules), placed(modules, schedule, device), world.watched():
        objective = _Objective(module, hooks.companions, loss)
        _agree(world, objective, schedule, seed, len(split), keep)
        keeper = None
        if keep is not None:
            facts = (seed, len(split), keep.identity, sorted(hooks.stateful))
            keeper = Keeper(keep, fingerprint_of(objective, schedule, *facts))
        training = _Training(objective, split, schedule, seed, hooks, _strategy(world, schedule))
        training.run(keeper)
        if hooks.finish is not None:
            module.eval()
            seed_all(seed, "finish")
            with torch.no_grad():
                hooks.finish(module)
        world.from_leader(tensors_of(objective).values())
    return training.done


def _check(module: nn.Module, schedule: Schedule, seed: int, hooks: Hooks) -> None:
    if seed < 0:
        raise ConfigError(f"seed: expected a whole number from 0 on, got {seed}")
    if schedule.patience is not None and hooks.evaluate is None:
        raise ConfigError(
            "Schedule.patience needs a metric to wait for, but none is evaluated: give the task a 'search' split (or "
            "Hooks.evaluate), or leave patience out"
        )
    if not any(parameter.requires_grad for part in (module, *hooks.companions) for parameter in part.parameters()):
        raise ModelError("no parameter of the model trains; call model.requires_grad_(True) first")


def _agree(
    world: World, objective: nn.Module, schedule: Schedule, seed: int, examples: int, keep: Checkpoints | None
) -> None:
    """Makes sure that all processes train the same, from the leader's weights."""
    tensors = tensors_of(objective)
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    world.agree("the schedule", schedule.model_dump(mode="json", exclude={"device"}))
    world.agree("seed, number of examples, or identity of the checkpoints", (seed, examples, keep and keep.identity))
    world.agree("the model", shapes)
    world.from_leader(tensors.values())


def _strategy(world: World, schedule: Schedule) -> Strategy:
    if world.size == 1:
        return Strategy(world)
    if schedule.parallel == "data":
        return Replicated(world)
    from tersor.train.sharded import Sharded  # takes a second to import, and not every build of PyTorch has it

    return Sharded(world, schedule)


@contextmanager
def _gradients(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, gradients are computed whatever the caller is doing; afterwards they are gone and all is in eval mode."""
    with torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        finally:
            for module in modules:
                module.eval().zero_grad(set_to_none=True)


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

    optimizer: Optimizer

    def __init__(
        self,
        objective: _Objective,
        split: Split,
        schedule: Schedule,
        seed: int,
        hooks: Hooks,
        strategy: Strategy,
    ) -> None:
        self.objective, self.module, self.strategy, self.world = objective, objective.module, strategy, strategy.world
        self.schedule, self.seed, self.hooks = schedule, seed, hooks
        self.batches = StepBatches(split, schedule, seed, self.world)
        self.device = self.world.device
        self.done = Trained()
        self.running: list[float] = []
        self.best: tuple[float, Weights] | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.precision == "float16")
        self.average = None if schedule.ema is None else Average(self.module, schedule.ema)
        self._started, self._examples = time.perf_counter(), 0

    def run(self, keeper: Keeper | None) -> None:
        """All epochs, or those that are left."""
        state = keeper.read() if keeper is not None else None
        with self.strategy.spread(self.objective) as wrapped:
            self.optimizer = self.schedule.optimizer_for(self.objective)
            if state is not None:
                self._load(state)
            self.world.agree("the checkpoint (all must see the same directory)", self.done.steps)
            self._train(wrapped, keeper)
        self._finish()

    def _train(self, wrapped: nn.Module, keeper: Keeper | None) -> None:
        self.objective.train()
        self._started, first = time.perf_counter(), self.done.steps
        stopped = self._out_of_patience()
        with closing(self.batches.loaded(first)) as batches:
            for step, batch in enumerate(batches if not stopped else (), start=first):
                due = keeper is not None and keeper.due(step + 1)
                due = self._step(wrapped, batch, step, due=due)
                if self.done.steps % self.batches.steps == 0 or self.done.steps == len(self.batches):
                    self._end_epoch()
                    stopped = self._out_of_patience()
                if due or stopped or self.done.steps == len(self.batches):
                    self._keep(keeper)
                if stopped:
                    break

    def _step(self, wrapped: nn.Module, batch: Batch, step: int, *, due: bool) -> bool:
        """One optimizer step; whether the leader finds that a checkpoint is due."""
        epoch, within = divmod(step, self.batches.steps)
        lr = self.schedule.learning_rate(step, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch.check_finite(f"training batch {within} of epoch {epoch}")
        batch = moved(batch, self.schedule, self.device)
        if self.hooks.before_step is not None:
            seed_all(self.seed, "before", step)
            with self.strategy.whole():
                self.hooks.before_step(step, len(self.batches))
        seed_all(self.seed, "model", step, self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        value = self._backward(wrapped, batch)
        mean, due_here = self.world.mean([value, float(due and self.world.leads)])
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the training loss became {mean} in epoch {epoch}, step {within} (learning rate {lr:.2g}); lower lr "
                "or set clip_norm" + named(batch)
            )
        if self.schedule.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.schedule.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._after_step(step)
        self.running.append(mean)
        self.done.steps = step + 1
        self._examples += len(batch) * self.world.size
        self._tell(mean)
        return due_here > 0

    def _after_step(self, step: int) -> None:
        self.world.from_leader(self.objective.buffers())
        if self.hooks.after_step is None and self.average is None:
            return
        with self.strategy.whole():
            if self.hooks.after_step is not None:
                seed_all(self.seed, "after", step)
                self.hooks.after_step()
            if self.average is not None:
                self.average.update()

    def _backward(self, wrapped: nn.Module, batch: Batch) -> float:
        """Gradients of the batch, part by part; its loss."""
        # Parts as large as those of a whole batch: a short last batch is not cut into single examples, on which
        # BatchNorm cannot train.
        size, largest = len(batch), -(-self.schedule.batch_size // (self.world.size * self.schedule.accumulate))
        parts = -(-size // largest)
        bounds = [size * part // parts for part in range(parts + 1)]
        total = 0.0
        for part in range(parts):
            start, end = bounds[part], bounds[part + 1]
            piece = batch if parts == 1 else batch.map(lambda value, a=start, b=end: value[a:b])  # type: ignore[misc]
            last = part == parts - 1
            with self.strategy.accumulating(wrapped) if not last else nullcontext():
                with arithmetic(self.schedule, self.device):
                    value: Tensor = wrapped(piece)
                if value.ndim:
                    raise ConfigError(
                        f"the loss must be one number, a mean over the batch, got shape {list(value.shape)}; end it "
                        "with .mean()"
                    )
                share = value * ((end - start) / size) if parts > 1 else value
                self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            total += float(share.detach())
        return total

    def _end_epoch(self) -> None:
        self.done.losses.append(sum(self.running) / len(self.running))
        self.running = []
        self.done.best_epoch = len(self.done.losses) - 1
        if self.hooks.evaluate is None:
            return
        epoch = len(self.done.losses) - 1
        with self.strategy.whole(), self.average.installed() if self.average is not None else nullcontext():
            self.module.eval()
            seed_all(self.seed, "evaluate", epoch)
            with torch.no_grad():
                metric = float(self.hooks.evaluate(self.module))
            metric = self.world.mean([metric])[0]
            if math.isnan(metric):
                raise NonFiniteError(
                    f"the metric on the search split became NaN after epoch {epoch}; look at the model's outputs there"
                )
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
            self.average.install()
        elapsed = time.perf_counter() - self._started
        if self._examples:
            self.done.examples_per_second = self._examples / elapsed

    def _tell(self, loss: float) -> None:
        if self.hooks.progress is None or not self.world.leads:
            return
        facts = {"loss": loss, "examples/s": self._examples / max(time.perf_counter() - self._started, 1e-9)}
        if self.done.metrics:
            facts["metric"] = self.done.metrics[-1]
        self.hooks.progress(self.done.steps, len(self.batches), facts)

    def _keep(self, keeper: Keeper | None) -> None:
        with self.strategy.whole():
            self._check_weights()
            if keeper is not None:
                state = self._state()
                if self.world.leads:
                    keeper.write(state)

    def _check_weights(self) -> None:
        for name, tensor in tensors_of(self.objective).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name.removeprefix('module.')!r} became NaN or Inf within {self.done.steps} steps; lower lr or "
                    "set clip_norm. The checkpoint before stays"
                )

    def _state(self) -> dict[str, Any]:
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.strategy.optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.weights,
            "best": None if self.best is None else {"metric": self.best[0], "weights": self.best[1]},
            "done": asdict(self.done),
            "running": self.running,
            "stateful": self._stateful(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        kept = state["stateful"]  # by process; those of another number of processes go on from the leader's
        for name, item in self.hooks.stateful.items():  # first, for they may change what the module does
            item.load_state_dict(kept[self.world.rank if len(kept) == self.world.size else 0][name])
        with self.strategy.whole():
            self.objective.load_state_dict(state["objective"])
        self.strategy.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])
        if state["best"] is not None:
            self.best = state["best"]["metric"], state["best"]["weights"]
        self.done, self.running = Trained(**state["done"]), state["running"]

    def _stateful(self) -> list[dict[str, Any]]:
        if not self.hooks.stateful:
            return []
        return self.world.gathered({name: item.state_dict() for name, item in self.hooks.stateful.items()})
