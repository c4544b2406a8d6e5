"""A student made of the original's own layers, as a step of a recipe."""

from __future__ import annotations

import time
from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.distill.students.repeats import Repeats, find_repeats
from tersor.distill.students.shallow import Keep, every_kth
from tersor.errors import SurgeryError

DEFAULT_SHARE = 0.5


class EveryKth(Step):
    """Keeps some of the model's repeated layers, with their weights; let `recover` follow, which teaches them.

    `layers` is how many stay in the longest list, or `share` which part of it (half by default); other lists shrink in
    proportion. `keep`, `path`: see `tersor.distill.students.every_kth`.
    """

    name: ClassVar[str] = "distill.every_kth"
    kind: ClassVar[Kind] = "prune"

    layers: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, lt=1)
    keep: Keep = "spread"
    path: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> EveryKth:
        if self.layers is not None and self.share is not None:
            raise ValueError("expected either layers or share, not both")
        return self

    def check(self, context: Context) -> None:
        """Raises `ModelError` if the original has no repeated layers, `ConfigError` if the path is no list of it."""
        self._rows(context.original)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Cuts a copy; `ConfigError` or `ModelError` if layers, path or model do not fit."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        layers = self.layers
        if layers is None:
            longest = max(self._rows(fresh.module), key=lambda row: len(row.blocks))
            share = DEFAULT_SHARE if self.share is None else self.share
            layers = max(longest.least, round(share * len(longest.blocks)))
        example = context.task.example(2)
        student = every_kth(
            fresh.module,
            layers=layers,
            keep=self.keep,
            path=self.path,
            example_inputs=example.kwargs or example.args,
        )
        if student.surgery is None:
            raise SurgeryError(
                f"{type(fresh.module).__name__} is configured layer by layer, in a way that an artifact cannot "
                "write down; make the student by tersor.distill.students.every_kth, train it by tersor.distill.train "
                "and compress that"
            )
        notes = [f"layers that stay in {path or 'the model'!r}: {list(kept)}" for path, kept in student.layers.items()]
        done = fresh.after(student.surgery, student.module.eval().requires_grad_(False))
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)

    def _rows(self, module: nn.Module) -> list[Repeats]:
        return find_repeats(module, None if self.path is None else [self.path])
