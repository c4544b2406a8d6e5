"""The demo: a small convolutional network for handwritten digits, trained in seconds, then compressed.

Shapes: `B` batch; images are `[B, 1, 8, 8]`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.budget import Budget
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import RuntimeUnavailableError
from tersor.pipeline import Result, compress
from tersor.train import Schedule, fit, supervised

SCHEDULE = Schedule(epochs=25, lr=0.1, batch_size=64)


class DigitsNet(nn.Module):
    """Four convolutions and a linear layer, 112,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 32, 64, 64, 96]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.insert(6, nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 1, 8, 8]` -> logits `[B, 10]`."""
        features: Tensor = self.features(images)
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def digits_task(seed: int = 0) -> Task:
    """The 1,797 handwritten digits that scikit-learn ships, split by seed.

    Raises:
        RuntimeUnavailableError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeUnavailableError("the demo needs scikit-learn; run: pip install 'tersor[demo]'") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    return Task.from_dataset(
        (images, torch.from_numpy(digits.target)),
        seed=seed,
        fractions={"train": 0.5, "certify": 0.3, "report": 0.2},
        class_names=tuple(str(digit) for digit in range(10)),
        preprocessing="8x8 grey image, one channel, values 0..1",
    )


def trained_net(task: Task, seed: int = 0) -> DigitsNet:
    """Trains the network on the task's training split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsNet()
    fit(net, task.require("train", "the demo"), supervised(task, SCHEDULE), schedule=SCHEDULE, seed=seed)
    return net


def run_demo(out: Path, *, runtime: str, threads: int, seed: int) -> Result:
    """Trains, compresses to int8 under a budget of two points, and certifies."""
    task = digits_task(seed)
    return compress(
        trained_net(task, seed),
        task,
        budget=Budget(max_drop=0.02, confidence=0.95),
        target=Target(runtime, threads=threads),
        recipe="int8",
        out=out,
        seed=seed,
    )
