"""Distillation in one call: a student of any shape learns from one or several teachers.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Furlanello et al. 2018 (born-again networks),
https://arxiv.org/abs/1805.04770.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.task import Task
from tersor.distill.ensemble import Ensemble
from tersor.distill.identity import identity_of
from tersor.distill.objective import Objective, declared
from tersor.distill.terms import STANDARD, Losses
from tersor.errors import ConfigError
from tersor.train import Checkpoints, Hooks, Schedule, Trained, answers_of, evaluation, fit
from tersor.train.placement import device_of

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
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Distilled:
    """Trains a copy of `student` to answer like `teacher` on the task's training examples.

    ```python
    done = tersor.distill.train(student, teacher, task)
    done = tersor.distill.train(student, teacher, task, losses=["kd", {"hint": {"weight": 10}}], out="runs/student")
    ```

    Args:
        student: Stays as it is. Parameters that need no gradients are not trained.
        teacher: Stays as it is; of several, the mean of their probabilities teaches.
        task: With a train split; with a search split, its metric is told after every epoch.
        losses: Terms of the sum: names, `{name: settings}` or `Term`s; by default ``0.9 · kd + 0.1 · task``.
        schedule: Epochs, batch size, optimizer and so on.
        seed: Fixes everything random.
        out: A directory for checkpoints, and for the teacher's answers with `cache`: a call that was killed goes on
            when it is repeated. Another call in the same directory is refused.
        cache: Whether the teacher answers each example once only; not for examples that are drawn at random.
        progress: `(steps done, steps in all, facts)`.

    Raises:
        ConfigError, DataError: if losses, schedule, examples and student do not fit together.
        ModelError: if student and teacher do not answer alike, or no parameter of the student trains.
        NonFiniteError: if the loss becomes NaN or Inf.
        OutputDirectoryError, IntegrityError: if `out` has files of another training, or damaged ones.
    """
    terms, schedule = Losses(losses=losses).losses, schedule or Schedule()
    if cache and out is None:
        raise ConfigError("cache keeps the teacher's answers on disk; say where: out")
    directory = None if out is None else Path(out)
    model = _as_module(teacher, task)
    fresh = copy.deepcopy(student)
    objective = Objective(
        terms,
        fresh,
        model,
        task,
        schedule=schedule,
        seed=seed,
        cache=directory / ANSWERS if directory is not None and cache else None,
    )
    keep = None
    if directory is not None:
        identity = identity_of(task, [model], repr(terms), device=device_of(fresh, schedule))
        keep = Checkpoints(directory / TRAINING, identity=identity)
    trained = fit(
        fresh,
        task.require("train", "distillation"),
        objective,
        schedule=schedule,
        seed=seed,
        hooks=Hooks(
            evaluate=evaluation(task, answers_of(model, declared(model, task))),
            progress=progress,
            companions=objective.companions,
        ),
        keep=keep,
    )
    return Distilled(fresh, trained, tuple(objective.notes))


def _as_module(teacher: nn.Module | Sequence[nn.Module], task: Task) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, Sequence):
        raise ConfigError(f"teacher: expected an nn.Module or several, got {type(teacher).__name__}")
    return Ensemble(teacher, output=task.output)
