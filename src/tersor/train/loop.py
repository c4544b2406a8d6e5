"""The training loop: it is handed a loss and callbacks and knows nothing about methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.core.split import Split
from tersor.errors import NonFiniteError

START = 1 / 25  # share of the peak learning rate at which the first step would begin
BatchLoss = Callable[[nn.Module, Batch], Tensor]


class Schedule(Config):
    """How long and how fast: one-cycle learning rate (Smith & Topin 2019, https://arxiv.org/abs/1708.07120).

    `lr` is the peak; the first `warmup` share of all steps rises to it, the rest anneals to zero by a cosine.
    """

    epochs: int = Field(default=1, ge=1)
    lr: float = Field(default=0.01, gt=0)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.1, gt=0, lt=1)
    clip_norm: float | None = Field(default=None, gt=0)


def learning_rate(step: int, total: int, schedule: Schedule) -> float:
    """The rate in the middle of `step` of `total`: up by a cosine from a 25th of the peak, then down to zero."""
    position, top = step + 0.5, schedule.warmup * total
    if position < top:
        return schedule.lr * (START + (1 - START) * (1 - math.cos(math.pi * position / top)) / 2)
    return schedule.lr * (1 + math.cos(math.pi * (position - top) / (total - top))) / 2


def fit(
    module: nn.Module,
    split: Split,
    loss: BatchLoss,
    *,
    schedule: Schedule,
    seed: int,
    before_step: Callable[[int, int], None] | None = None,
    after_step: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Trains `module` in place and leaves it in evaluation mode.

    The result is the last step's, never a best one picked on some split. The same seed gives the same weights,
    bit for bit, on the same machine. A last batch of one example is left out: BatchNorm cannot train on it.

    Args:
        module: Trained in place.
        split: The training examples.
        loss: `(module, batch) -> scalar`.
        schedule: Epochs, batch size, optimizer, learning rate.
        seed: Fixes the order of the examples and everything random in model and data.
        before_step: Called with `(step, steps in all)` before every forward pass, e.g. to freeze a part in time.
        after_step: Called after every optimizer step, e.g. to apply masks.
        progress: `(steps done, steps in all)`.

    Returns:
        Mean loss of each epoch.

    Raises:
        NonFiniteError: if the loss becomes NaN or Inf, naming epoch and step.
    """
    steps_per_epoch = -(-len(split) // schedule.batch_size)
    if schedule.batch_size > 1 and steps_per_epoch > 1 and len(split) % schedule.batch_size == 1:
        steps_per_epoch -= 1
    total = schedule.epochs * steps_per_epoch
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        optimizer = _optimizer(module, schedule)
        module.train()
        for epoch in range(schedule.epochs):
            running = 0.0
            batches = split.shuffled(schedule.batch_size, seed * 1_000_003 + epoch)
            for step, batch in enumerate(islice(batches, steps_per_epoch)):
                lr = learning_rate(epoch * steps_per_epoch + step, total, schedule)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch.check_finite(f"training batch {step} of epoch {epoch}")
                if before_step is not None:
                    before_step(epoch * steps_per_epoch + step, total)
                optimizer.zero_grad(set_to_none=True)
                value = loss(module, batch)
                if not bool(torch.isfinite(value)):
                    raise NonFiniteError(
                        f"the training loss became {float(value.detach())} in epoch {epoch}, step {step} "
                        f"(learning rate {lr:.2g}); lower lr or set clip_norm"
                    )
                value.backward()  # type: ignore[no-untyped-call]
                if schedule.clip_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), schedule.clip_norm)
                optimizer.step()
                if after_step is not None:
                    after_step()
                running += float(value.detach())
                if progress is not None:
                    progress(epoch * steps_per_epoch + step + 1, total)
            losses.append(running / steps_per_epoch)
    module.eval()
    return losses


def _optimizer(module: nn.Module, schedule: Schedule) -> Optimizer:
    """Weight decay falls on weights only: biases and normalisation scales have fewer than two dimensions."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "adamw":
        return AdamW(groups, lr=schedule.lr)
    return SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.momentum > 0)
