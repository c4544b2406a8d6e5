"""A recipe: a frozen, ordered tuple of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.core.order import check_order
from tersor.core.step import Step
from tersor.errors import ConfigError


@dataclass(frozen=True, init=False)
class Recipe:
    """Steps in the order in which they run; an impossible order raises `OrderError` at once.

    An empty recipe only converts the model to the target runtime. YAML is the serialisation: see
    `tersor.recipes`.
    """

    steps: tuple[Step, ...]
    name: str

    def __init__(self, steps: Sequence[Step] = (), name: str = "custom") -> None:
        for position, step in enumerate(steps):
            if not isinstance(step, Step):
                raise ConfigError(f"Recipe.steps[{position}]: expected a Step, got {type(step).__name__}")
        check_order(steps)
        object.__setattr__(self, "steps", tuple(steps))
        object.__setattr__(self, "name", name)

    def as_data(self) -> dict[str, object]:
        """The recipe as plain data: `{"name": …, "steps": [{step name: settings}]}`."""
        return {
            "name": self.name,
            "steps": [{step.name: step.model_dump(mode="json")} for step in self.steps],
        }
