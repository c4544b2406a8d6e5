"""A pattern by its name: `unstructured`, `2:4` (two of every four stay), `4x1` (blocks of outputs x inputs)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from tersor.errors import ConfigError
from tersor.prune.patterns.block import block, block_scores, spread
from tersor.prune.patterns.n_m import n_m
from tersor.prune.patterns.unstructured import unstructured

N_M = re.compile(r"([1-9]\d?):([1-9]\d?)")
BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Pattern:
    """Which entries of a weight matrix `[O, K]` go together.

    Attributes:
        name: As recipes write it.
        size: Rows and columns of a block; `(1, 1)` is entry by entry.
        n_m: How many of how many stay; None where the amount is free.
    """

    name: str
    size: tuple[int, int] = (1, 1)
    n_m: tuple[int, int] | None = None

    @property
    def share(self) -> float | None:
        """The share that the pattern itself removes; None where the amount is free."""
        return None if self.n_m is None else 1 - self.n_m[0] / self.n_m[1]

    def refusal(self, inputs: int) -> str | None:
        """Why a weight with so many inputs cannot have the pattern; None if it can."""
        if self.n_m is not None and inputs % self.n_m[1]:
            return f"{self.name} needs inputs in groups of {self.n_m[1]}, this weight has {inputs}"
        return None

    def units(self, scores: Tensor) -> Tensor:
        """Scores of what goes together: entries `[O, K]`, or blocks `[R, C]`."""
        return scores if self.size == (1, 1) else block_scores(scores, *self.size)

    def keep(self, scores: Tensor, amount: float) -> Tensor:
        """Keep-mask `[O, K]`; an N:M pattern has its own amount."""
        if self.n_m is not None:
            return n_m(scores, *self.n_m)
        return unstructured(scores, amount) if self.size == (1, 1) else block(scores, amount, *self.size)

    def spread(self, keep: Tensor, outputs: int, inputs: int) -> Tensor:
        """A value per unit to a value per entry."""
        return spread(keep, outputs, inputs, self.size)


def pattern_of(name: str) -> Pattern:
    """The pattern of that name.

    Raises:
        ConfigError: if it is none.
    """
    if name == "unstructured":
        return Pattern(name)
    if (found := N_M.fullmatch(name)) and int(found[1]) < int(found[2]):
        return Pattern(name, n_m=(int(found[1]), int(found[2])))
    if (found := BLOCK.fullmatch(name)) and found[0] != "1x1":
        return Pattern(name, size=(int(found[1]), int(found[2])))
    raise ConfigError(
        f"pattern: expected 'unstructured', 'N:M' with N < M such as '2:4', or blocks such as '4x1', got {name!r}"
    )
