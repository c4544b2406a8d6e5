"""What a search does where its settings leave it open: formats and trainings by the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tersor.core.task import Task
from tersor.distill import Recover, Term
from tersor.runtimes import Runtime
from tersor.search.family import FamilyName
from tersor.search.moves import FORMATS
from tersor.search.settings import Search
from tersor.train import Schedule

_CNN = Schedule(lr=0.02, channels_last=True)
_FINE = Schedule(optimizer="adamw", lr=1e-4, batch_size=32, weight_decay=0.01)
_FRESH = Schedule(optimizer="adamw", lr=2e-3, batch_size=64, weight_decay=0.01, clip_norm=1.0)
SCHEDULES: Mapping[FamilyName, Schedule] = MappingProxyType(
    {"cnn": _CNN, "transformer": _FINE, "lm": _FINE, "mixed": _FINE, "rnn": _FRESH, "mlp": _FRESH}
)
# Static int8 keeps recurrent layers in float; dynamic int8 keeps convolutions in float.
SUITABLE: Mapping[FamilyName, tuple[str, ...]] = MappingProxyType(
    {
        "cnn": ("float32", "int8"),
        "transformer": ("float32", "int8", "int8-dynamic"),
        "lm": ("float32", "int8-dynamic"),
        "rnn": ("float32", "int8-dynamic"),
        "mlp": ("float32", "int8", "int8-dynamic"),
        "mixed": ("float32", "int8", "int8-dynamic"),
    }
)
LABELS, ORIGINAL = 0.1, 0.9


def formats_for(family: FamilyName, runtime: Runtime) -> tuple[str, ...]:
    """Number formats that suit the family and that the runtime has kernels for."""
    return tuple(
        name
        for name in SUITABLE[family]
        if all(step.precision is None or step.precision in runtime.formats for step in FORMATS[name])
    )


def training(settings: Search, family: FamilyName, task: Task, steps: int) -> Recover:
    """One training of so many steps, from the original's answers and, where there are some, labels."""
    train = task.require("train", "a search that cuts and trains")
    base = settings.schedule or SCHEDULES[family]
    epochs = -(-steps // base.steps_per_epoch(len(train)))
    schedule = base.model_copy(update={"epochs": epochs, "max_steps": steps})
    terms = (
        Term(loss="kd", weight=ORIGINAL, settings={"temperature": settings.temperature}),
        Term(loss="task", weight=LABELS),
    )
    labelled = train.batch([0]).labels is not None
    return Recover(schedule=schedule, losses=terms if labelled else terms[:1])
