"""How long a training takes, how fast it goes, and how it computes."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tersor.core.config import Config

START = 1 / 25  # share of the peak learning rate at which the first step would begin


class Schedule(Config):
    """Warm-up and decay of the learning rate, the optimizer, and how steps are computed.

    With `decay: cosine` this is the one-cycle schedule (Smith & Topin 2019, https://arxiv.org/abs/1708.07120) without
    its cycle of the momentum.

    Attributes:
        epochs: Passes over the examples.
        max_steps: Optimizer steps after which training ends, the learning rate having fallen by then; None: with the
            last epoch.
        lr: The peak of the learning rate.
        batch_size: Examples of one optimizer step, over all processes.
        optimizer: `sgd` (Nesterov) or `adamw`.
        momentum: Of `sgd`.
        weight_decay: On weights; biases and scales of norms are spared.
        warmup: Share of all steps in which the rate rises from a 25th of the peak.
        decay: How it falls afterwards: to zero by a `cosine` or `linear`ly, or not at all (`constant`).
        clip_norm: Largest norm of all gradients together.
        accumulate: Parts into which a batch is split to save memory; their gradients add up to the whole batch's.
        precision: Number format of the forward pass; weights and optimizer stay float32. `float16` needs CUDA.
        channels_last: Memory layout of images and convolutions; faster on most processors.
        compile: Whether `torch.compile` compiles the model for the training.
        ema: Decay of an exponential moving average of the weights, which the result then is. Polyak & Juditsky 1992,
            https://doi.org/10.1137/0330046.
        label_smoothing: Share of each label that goes to all classes alike. Szegedy et al. 2016,
            https://arxiv.org/abs/1512.00567.
        mixup: Parameter of the beta distribution from which examples are blended in pairs; 0 for not at all. Zhang et
            al. 2018, https://arxiv.org/abs/1710.09412.
        patience: Epochs without a better metric on the search split after which training ends; the weights are then
            those of the best epoch there.
        workers: Processes that load data; the result does not depend on it.
        parallel: What several processes do (see `tersor.train.parallel`): each holds all weights (`data`), or its part
            of them (`sharded`).
        device: Where to train, such as `cuda`; the model comes back to where it was. None: where it is.
    """

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    lr: float = Field(default=0.01, gt=0)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.1, gt=0, lt=1)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    clip_norm: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    patience: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)
    parallel: Literal["data", "sharded"] = "data"
    device: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.accumulate > self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} has no {self.accumulate} parts")
        return self

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps of one epoch; a last batch of one example is left out: BatchNorm cannot train on it."""
        steps = -(-examples // self.batch_size)
        if self.batch_size > 1 and steps > 1 and examples % self.batch_size == 1:
            steps -= 1
        return steps

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole training."""
        steps = self.epochs * self.steps_per_epoch(examples)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate(self, step: int, total: int) -> float:
        """The rate in the middle of `step` of `total`."""
        position, top = step + 0.5, self.warmup * total
        if position < top:
            return self.lr * (START + (1 - START) * (1 - math.cos(math.pi * position / top)) / 2)
        rest = (position - top) / (total - top)
        if self.decay == "constant":
            return self.lr
        return self.lr * (1 - rest if self.decay == "linear" else (1 + math.cos(math.pi * rest)) / 2)

    def optimizer_for(self, *modules: nn.Module) -> Optimizer:
        """The optimizer of all parameters that train; decay falls on those of at least two dimensions."""
        parameters = list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return AdamW(groups, lr=self.lr)
        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
