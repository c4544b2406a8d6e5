"""What every kind of pruning ends with: a smaller model, and what is known about it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.core.surgery import Surgery
from tersor.graph import Frozen, apply_surgery
from tersor.probe import reestimate_batchnorm


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A pruned model and what is known about it, whatever was removed.

    Attributes:
        model: The smaller model.
        surgery: What was done, as data; `tersor.graph.apply_surgery` replays it on a freshly built model.
        frozen: What could not be removed, with the reason.
        params_before: Number of parameters.
        params_after: Number of parameters.
        macs_before: Multiply-accumulates on the first example input.
        macs_after: Multiply-accumulates on the first example input.
        max_error: Largest relative difference from the reference that a check saw; None if none was asked for.
        seconds: Spent on each part of the work.
        notes: What a reader must know.
    """

    model: nn.Module
    surgery: Surgery
    frozen: list[Frozen]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    max_error: float | None
    seconds: Mapping[str, float]
    notes: list[str] = field(default_factory=list)

    def told(self, what: Sequence[str], more: Sequence[str] = ()) -> str:
        """As text: what was removed, the sizes, the proof, what is frozen, `more`, the notes."""
        return "\n".join(
            [
                *what,
                _change("parameters", self.params_before, self.params_after),
                _change("MACs", self.macs_before, self.macs_after),
                "not verified" if self.max_error is None else f"verified, max relative error {self.max_error:.1e}",
                *(f"frozen {item.name}: {item.reason}" for item in self.frozen),
                *more,
                *self.notes,
            ]
        )


def _change(name: str, before: int, after: int) -> str:
    return f"{name} {before:,} -> {after:,} ({1 - after / max(1, before):.1%} removed)"


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def with_statistics(model: nn.Module, batches: Sequence[Any] | None) -> list[str]:
    """Re-estimates BatchNorm statistics in place, where there is data; returns what a reader must know."""
    count = reestimate_batchnorm(model, batches) if batches is not None else 0
    return [f"statistics of {count} BatchNorm layers re-estimated"] if count else []


def carried_out(
    model: nn.Module, surgery: Surgery, batches: Sequence[Any] | None, inplace: bool
) -> tuple[nn.Module, list[str]]:
    """Applies a surgery to a copy, and to `model` itself only once all went well; returns the result and notes."""
    result = apply_surgery(copy.deepcopy(model), surgery)
    notes = with_statistics(result, batches) if surgery != Surgery() else []
    if not inplace:
        return result, notes
    changed = apply_surgery(model, surgery)
    changed.load_state_dict(result.state_dict())
    return changed, notes
