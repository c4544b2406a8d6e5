"""What a search may do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tersor.core.config import Config
from tersor.train import Schedule

Strategy = Literal["program", "sampler", "once-for-all"]


class Search(Config):
    """How the fastest model inside the budget is looked for: `compress(..., recipe=Search(minutes=60))`.

    ``recipe="auto"`` with ``Budget(minutes=...)`` is this with all defaults.

    Attributes:
        minutes: Time on the clock for everything, the certificate included.
        strategy: `program` solves an integer program over measured tables, and refines with a sampler; `sampler`
            draws by itself, as a baseline; `once-for-all` slices one super-network.
        formats: Number formats to choose from; None: all that the target's kernels run and the model's family suits.
        kinds: What may be cut, of `block`, `channel`, `head`, `hidden`, `width`; None for all, `()` for nothing.
        trials: Trials with the shortest training.
        refine: How many of them a sampler draws near the front.
        eta: One trial of so many goes on, with so many times the training. Jamieson & Talwalkar 2016,
            https://arxiv.org/abs/1502.07943.
        finalists: Trials that are trained to the end.
        schedule: Of every training; epochs and steps follow from the time. None: by the model's family.
        temperature: Of the distillation from the original.
        criterion: Which units go; see `tersor.prune.criteria`.
        points: Whole models whose latency the cost table is fitted on.
        workers: Trials at the same time, each with its share of the threads.
        memory_bytes: Resident memory at which a trial is ended; None for no limit.
        storage: URL of a shared database; None for a file in the run directory.
    """

    minutes: float = Field(default=20.0, gt=0)
    strategy: Strategy = "program"
    formats: tuple[str, ...] | None = Field(default=None, min_length=1, strict=False)
    kinds: tuple[Literal["block", "channel", "head", "hidden", "width"], ...] | None = Field(default=None, strict=False)
    trials: int = Field(default=8, ge=1)
    refine: int = Field(default=2, ge=0)
    eta: int = Field(default=4, ge=2)
    finalists: int = Field(default=2, ge=1)
    schedule: Schedule | None = None
    temperature: float = Field(default=4.0, gt=0)
    criterion: str = "l2"
    points: int = Field(default=20, ge=4)
    workers: int = Field(default=1, ge=1)
    memory_bytes: int | None = Field(default=None, gt=0)
    storage: str | None = None
