"""What a step may see beside its candidate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from torch import Tensor, nn

from tersor.core.target import Target
from tersor.core.task import Task

logger = logging.getLogger("tersor")

NO_FACTS: Mapping[str, float] = MappingProxyType({})


class Progress(Protocol):
    """Shows how far work is: `(label, done, total)`, and facts such as the loss."""

    def __call__(self, label: str, done: int, total: int, facts: Mapping[str, float] = NO_FACTS, /) -> None:
        """Called as work goes on."""


Distance = Callable[[Tensor, Tensor, float], Tensor]


def _silent(label: str, done: int, total: int, facts: Mapping[str, float] = NO_FACTS, /) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Context:
    """The task, the target, the original model and how to show progress.

    Attributes:
        task: Data, metric, loss.
        target: Where the result will run.
        original: A frozen copy of the caller's model: teacher and reference.
        seed: Fixes every random choice of the run.
        progress: Shows how far work is.
        directory: Where a step may keep what it needs to go on after an interruption; None if nothing is kept. It is
            gone once the step is done.
        losses: Distillation losses by name, `(outputs, original's outputs, temperature) -> scalar`, for steps that
            train but may not import `distill`.
    """

    task: Task
    target: Target
    original: nn.Module
    seed: int = 0
    progress: Progress = field(default=_silent)
    directory: Path | None = None
    losses: Mapping[str, Distance] = field(default_factory=dict)
