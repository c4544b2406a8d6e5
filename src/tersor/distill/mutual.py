"""Deep mutual learning: students train together, each with the others as its teachers.

Zhang et al. 2018, https://arxiv.org/abs/1706.00384.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.task import Task
from tersor.distill.losses import kd
from tersor.distill.train import TRAINING, Distilled
from tersor.errors import ConfigError, ModelError
from tersor.train import Checkpoints, Hooks, Schedule, blended, fit, hard_loss


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
    count as given.

    Args:
        students: At least two, of any shapes with the same outputs; they stay as they are.
        task: With a train split that has labels.
        weight: Of what is learned from each other.
        schedule: Epochs, batch size, optimizer and so on.
        seed: Fixes everything random.
        out: A directory for checkpoints.
        progress: `(steps done, steps in all, facts)`.

    Raises:
        ConfigError: if there are not two students, or two are the same object.
        ModelError: if their outputs differ in shape.
        DataError: if there are no labels.
    """
    if len(students) < 2 or len({id(student) for student in students}) < len(students):
        raise ConfigError(f"mutual learning needs at least two different students, got {len(students)}")
    schedule = schedule or Schedule()
    cohort = nn.ModuleList(copy.deepcopy(student) for student in students).requires_grad_(True)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        blend = blended(batch, schedule)
        assert isinstance(module, nn.ModuleList)  # noqa: S101 - the cohort itself
        answers = [select_output(blend.batch.call(student), task.output) for student in module]
        shapes = [tuple(answer.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise ModelError(f"students that learn from each other must answer in one shape, got {shapes}")
        total = torch.stack([hard_loss(answer, blend, task, schedule) for answer in answers]).sum()
        learned = [
            kd(answer, other.detach(), temperature=1.0)
            for place, answer in enumerate(answers)
            for position, other in enumerate(answers)
            if place != position
        ]
        return total + weight * torch.stack(learned).sum() / (len(answers) - 1)

    trained = fit(
        cohort,
        task.require("train", "mutual learning"),
        loss,
        schedule=schedule,
        seed=seed,
        hooks=Hooks(progress=progress),
        keep=None if out is None else Checkpoints(Path(out) / TRAINING, identity=f"mutual {weight}"),
    )
    return [Distilled(student, trained, ()) for student in cohort]
