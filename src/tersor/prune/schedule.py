"""Sparsity over time: how much is gone by when.

Symbols: ``s_i`` and ``s_f`` initial and final sparsity, `n` rounds, `p` the share of the way in [0, 1].
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tersor.core.config import Config
from tersor.errors import ConfigError

Curve = Literal["one_shot", "iterative", "cubic"]
Spacing = Literal["equal", "geometric"]


def iterative(final: float, rounds: int, *, initial: float = 0.0, spacing: Spacing = "geometric") -> tuple[float, ...]:
    """Sparsity after each of `rounds` rounds.

    Equal: ``s_i + (s_f − s_i) · r / n``. Geometric: each round removes the same share of what is left,
    ``1 − (1 − s_i) · ((1 − s_f) / (1 − s_i))^(r / n)``, as Frankle & Carbin 2018 do,
    https://arxiv.org/abs/1803.03635.
    """
    _check(initial, final)
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    if spacing == "equal":
        path = [initial + (final - initial) * step / rounds for step in range(1, rounds)]
    else:
        ratio = (1 - final) / (1 - initial)
        path = [1 - (1 - initial) * ratio ** (step / rounds) for step in range(1, rounds)]
    return (*path, final)


def cubic(position: float, final: float, *, initial: float = 0.0) -> float:
    """``s_f + (s_i − s_f) · (1 − p)³``: fast while much is redundant, slow towards the end.

    Zhu & Gupta 2017 (automated gradual pruning), https://arxiv.org/abs/1710.01878.
    """
    _check(initial, final)
    left = 1 - min(1.0, max(0.0, position))
    return final + (initial - final) * left**3


class SparsitySchedule(Config):
    """When the sparsity rises during training.

    Attributes:
        curve: `cubic` follows `cubic`; `iterative` takes `rounds` steps of `spacing`; `one_shot` one step at `begin`.
        begin: Share of all training steps after which the first weights go.
        end: Share of all training steps by which the last have gone.
        frequency: Training steps between two updates of the masks (`cubic`).
        initial_sparsity: Where `cubic` starts.
        rounds: How many updates `iterative` makes, evenly between `begin` and `end`.
        spacing: Of `iterative`: `equal`, or `geometric` for equal shares of what is left.
    """

    curve: Curve = "cubic"
    begin: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=0.75, ge=0, le=1)
    frequency: int = Field(default=10, ge=1)
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1)
    rounds: int = Field(default=5, ge=1)
    spacing: Spacing = "geometric"

    @model_validator(mode="after")
    def _ordered(self) -> SparsitySchedule:
        if self.begin > self.end:
            raise ValueError(f"begin must not be after end, got {self.begin} and {self.end}")
        return self

    def plan(self, sparsity: float, steps: int) -> dict[int, float]:
        """Sparsity to be reached after each training step that updates the masks, of `steps` in all.

        Steps count from 0: the update at 0 comes before any training. Ends with exactly `sparsity`.
        """
        _check(min(self.initial_sparsity, sparsity), sparsity)
        first = min(round(self.begin * steps), steps)
        last = min(max(first, round(self.end * steps)), steps)
        if self.curve == "one_shot":
            return {first: sparsity}
        if self.curve == "iterative":
            amounts = iterative(sparsity, self.rounds, spacing=self.spacing)
            gap = (last - first) / max(1, self.rounds - 1)
            return {first + round(index * gap): amount for index, amount in enumerate(amounts)} | {last: sparsity}
        initial = min(self.initial_sparsity, sparsity)
        way = max(1, last - first)
        updates = {
            step: cubic((step - first) / way, sparsity, initial=initial) for step in range(first, last, self.frequency)
        }
        return updates | {last: sparsity}


def _check(initial: float, final: float) -> None:
    if not 0 <= initial <= final < 1:
        raise ConfigError(f"expected 0 <= initial sparsity <= final sparsity < 1, got {initial} and {final}")
