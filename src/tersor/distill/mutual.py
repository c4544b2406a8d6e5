"""Deep mutual learning: students train together, each with the others as its teachers.

Zhang et al. 2018, https://arxiv.org/abs/1706.00384.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.task import Task
from tersor.distill.identity import identity_of
from tersor.distill.losses import kd
from tersor.distill.objective import check_examples, mask_of
from tersor.distill.terms import TASK, Term
from tersor.distill.train import TRAINING, Distilled
from tersor.errors import ConfigError, ModelError
from tersor.train import Checkpoints, Hooks, Schedule, blended, evaluation, fit, hard_loss
from tersor.train.placement import device_of


def mutual(
    students: Sequence[nn.Module],
    task: Task,
    *,
    weight: float = 1.0,
    schedule: Schedule | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> list[Distilled]:
    """Trains copies of the students together, without a teacher.

    Each student's loss is ``task loss + weight · mean over the others of KL(other ‖ student)``; the others' answers
    count as given. Losses and metrics that are told are those of all students: the sum of the former, the mean of the
    latter. Where tokens are padded, see `Objective`.

    Args:
        students: At least two, of any shapes with the same outputs; they stay as they are.
        task: With a train split that has labels; with a search split, the metric is told after every epoch.
        weight: Of what is learned from each other.
        schedule: Epochs, batch size, optimizer and so on.
        seed: Fixes everything random.
        out: A directory for checkpoints.
        progress: `(steps done, steps in all, facts)`.

    Raises:
        ConfigError: if there are not two students, two are the same object, or weight or schedule do not fit.
        ModelError: if their outputs differ in shape.
        DataError: if there are no labels.
        NonFiniteError: if the loss becomes NaN or Inf.
        OutputDirectoryError, IntegrityError: if `out` has files of another training, or damaged ones.
    """
    schedule = schedule or Schedule()
    different = len({id(student) for student in students})
    if different < 2 or different < len(students):
        raise ConfigError(
            f"mutual learning needs at least two different students, got {len(students)}, {different} of them different"
        )
    if not 0 < weight < math.inf:
        raise ConfigError(f"weight: expected a number above 0, got {weight}")
    if schedule.compile:
        raise ConfigError("Schedule.compile compiles one model, and here are several; leave it out")
    check_examples([Term(loss=TASK)], task, schedule, cached=False)
    cohort = nn.ModuleList(copy.deepcopy(student) for student in students)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        blend = blended(batch, schedule)
        assert isinstance(module, nn.ModuleList)  # noqa: S101 - the cohort itself
        answers = [select_output(blend.batch.call(student), task.output) for student in module]
        shapes = [tuple(answer.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise ModelError(f"students that learn from each other must answer in one shape, got {shapes}")
        total = torch.stack([hard_loss(answer, blend, task, schedule) for answer in answers]).sum()
        learned = [
            kd(answer, other, temperature=1.0, mask=mask_of(blend.batch, answer))
            for place, answer in enumerate(answers)
            for position, other in enumerate(answers)
            if place != position
        ]
        return total + weight * torch.stack(learned).sum() / (len(answers) - 1)

    metric = evaluation(task)

    def evaluate(module: nn.Module) -> float:
        assert metric is not None  # noqa: S101 - else it is not called
        return fmean(metric(student) for student in module.children())

    keep = None
    if out is not None:
        identity = identity_of(task, [], f"mutual {weight}", device=device_of(cohort, schedule))
        keep = Checkpoints(Path(out) / TRAINING, identity=identity)
    trained = fit(
        cohort,
        task.require("train", "mutual learning"),
        loss,
        schedule=schedule,
        seed=seed,
        hooks=Hooks(progress=progress, evaluate=None if metric is None else evaluate),
        keep=keep,
    )
    return [Distilled(student, trained, ()) for student in cohort]
