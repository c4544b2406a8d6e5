"""A step: one method, from candidate to candidate."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from tersor.core.candidate import Candidate
from tersor.core.config import Config
from tersor.core.context import Context
from tersor.core.task import Role

Kind = Literal["prune", "recover", "quantize"]


class Step(Config):
    """One compression step with its settings.

    A subclass sets `name` (as recipes write it) and `kind` (decides the legal order), and overrides `needs` (the
    splits that it reads) and, for quantization, `precision` (which the target runtime must be able to run).
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    rebuilds: ClassVar[bool] = False  # whether `resume` can build the simulation of a quantized candidate anew

    @property
    def needs(self) -> frozenset[Role]:
        """Splits that the task must have."""
        return frozenset()

    @property
    def precision(self) -> str | None:
        """Number format that the target must support, None for any."""
        return None

    def check(self, context: Context) -> None:
        """Refuses, before any step of a recipe has done work, what could not be done later."""

    def resume(self, candidate: Candidate, context: Context) -> Candidate:
        """What `apply` left, from what was kept of it on disk: everything but the simulation."""
        return candidate

    @abstractmethod
    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Returns a new candidate; `candidate` and its tensors stay as they are."""
