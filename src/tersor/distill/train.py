"""Distillation in one call: a student of any shape learns from one or several teachers.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Furlanello et al. 2018 (born-again networks),
https://arxiv.org/abs/1805.04770.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.task import Task
from tersor.distill.ensemble import Ensemble
from tersor.distill.objective import Objective
from tersor.distill.terms import STANDARD, Losses
from tersor.errors import ConfigError
from tersor.train import Checkpoints, Hooks, Schedule, Trained, evaluation, fit

TRAINING, ANSWERS = "training", "answers"


@dataclass(frozen=True)
class Distilled:
    """A trained student.

    Attributes:
        model: A copy of the student, trained, in evaluation mode.
        trained: Losses and metrics by epoch.
        notes: What was compared with what.
    """

    model: nn.Module
    trained: Trained
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.trained.told(), *self.notes])


def train(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    task: Task,
    *,
    losses: Any = STANDARD,
    schedule: Schedule | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    cache: bool = False,
    progress: Any = None,
) -> Distilled:
    """Trains a copy of `student` to answer like `teacher` on the task's training examples.

    ```python
    done = tersor.distill.train(student, teacher, task)
    done = tersor.distill.train(student, teacher, task, losses=["kd", {"hint": {"weight": 10}}], out="runs/student")
    ```

    Args:
        student: Stays as it is.
        teacher: Stays as it is; of several, the mean of their probabilities teaches.
        task: With a train split; with a search split, its metric is told after every epoch.
        losses: Terms of the sum: names, `{name: settings}` or `Term`s; by default ``0.9 · kd + 0.1 · task``.
        schedule: Epochs, batch size, optimizer and so on.
        seed: Fixes everything random.
        out: A directory for checkpoints, and for the teacher's answers with `cache`: a call that was killed goes on
            when it is repeated.
        cache: Whether the teacher answers each example once only; not for examples that are drawn at random.
        progress: `(steps done, steps in all, facts)`.

    Raises:
        ConfigError, DataError: if losses, schedule, examples and student do not fit together.
        ModelError: if student and teacher do not answer alike.
        NonFiniteError: if the loss becomes NaN or Inf.
    """
    terms, schedule = Losses(losses=losses).losses, schedule or Schedule()
    if cache and out is None:
        raise ConfigError("cache keeps the teacher's answers on disk; say where: out")
    directory = None if out is None else Path(out)
    model = teacher if isinstance(teacher, nn.Module) else Ensemble(list(teacher), output=task.output)
    fresh = copy.deepcopy(student).requires_grad_(True)
    objective = Objective(
        terms,
        fresh,
        model,
        task,
        schedule=schedule,
        seed=seed,
        cache=directory / ANSWERS if directory is not None and cache else None,
    )
    trained = fit(
        fresh,
        task.require("train", "distillation"),
        objective,
        schedule=schedule,
        seed=seed,
        hooks=Hooks(
            evaluate=evaluation(task, None if isinstance(model, Ensemble) else model),
            progress=progress,
            companions=objective.companions,
        ),
        keep=None if directory is None else Checkpoints(directory / TRAINING, identity=repr(terms)),
    )
    return Distilled(fresh, trained, tuple(objective.notes))
