"""What a step may see beside its candidate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from tersor.core.target import Target
from tersor.core.task import Task

logger = logging.getLogger("tersor")

Progress = Callable[[str, int, int], None]


def _silent(label: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Context:
    """The task, the target, the original model and how to show progress.

    Attributes:
        task: Data, metric, loss.
        target: Where the result will run.
        original: A frozen copy of the caller's model: teacher and reference.
        seed: Fixes every random choice of the run.
        progress: `(label, done, total)`, called as work goes on.
    """

    task: Task
    target: Target
    original: nn.Module
    seed: int = 0
    progress: Progress = field(default=_silent)
