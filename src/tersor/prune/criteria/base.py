"""What a criterion is, and how it reads the evidence about a weight.

Shapes: `O` outputs, `K` columns of a weight seen as a matrix `[O, K]` (a convolution's `I · h · w`), `G` groups, `U`
units of a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tersor.errors import ConfigError
from tersor.graph.coupling.family import Family
from tersor.probe import Evidence, Need

__all__ = ["Criterion", "Evidence", "Need", "has_needs", "missing", "per_column", "required"]

HOW: dict[Need, str] = {
    "gradient": "pass data=... and loss=...",
    "squared_gradient": "pass data=... and loss=...",
    "movement": "pass data=... and loss=...",
    "gram": "pass data=...",
    "zero_share": "pass data=...",
}


@dataclass(frozen=True)
class Criterion:
    """How much it would hurt to lose something; the lowest scores go first.

    One of `entries`, `slices` and `units` is given.

    Attributes:
        name: What recipes call it.
        entries: `(weight, evidence) -> scores` of the weight's shape; a unit's score adds up its entries.
        terms: Only beside `entries`, where what the entries of a unit do may cancel: signed terms of the weight's
            shape; a unit's score is the squared sum of its terms.
        slices: `(weight, dim, evidence) -> scores [weight.shape[dim]]`, where a slice is judged as a whole; None
            from the function means "says nothing about this dimension of this weight".
        units: `family -> scores [U]`, where not the weights count but which unit it is.
        needs: What must have been measured.
    """

    entries: Callable[[Tensor, Evidence], Tensor] | None = None
    slices: Callable[[Tensor, int, Evidence], Tensor | None] | None = None
    needs: frozenset[Need] = frozenset()
    terms: Callable[[Tensor, Evidence], Tensor] | None = None
    units: Callable[[Family], Tensor] | None = None
    name: str = "unnamed"


def has_needs(criterion: Criterion, evidence: Evidence) -> bool:
    """Whether all that the criterion needs was measured of this parameter."""
    return all(getattr(evidence, need) is not None for need in criterion.needs)


def missing(criterion: str, need: Need) -> ConfigError:
    """The error that says what to pass."""
    return ConfigError(
        f"criterion {criterion!r} needs the {need} of what it scores, which was not measured; {HOW[need]}"
    )


def required(evidence: Evidence, need: Need, weight: Tensor, criterion: str) -> Tensor:
    """One field of the evidence, checked against the weight.

    Raises:
        ConfigError: if it was not measured, or on a weight of another shape.
    """
    value: Tensor | None = getattr(evidence, need)
    if value is None:
        raise missing(criterion, need)
    outputs = weight.shape[evidence.output_dim] if weight.ndim else 1
    columns = weight.numel() // max(1, outputs)
    expected = {"gram": (columns, columns), "zero_share": (outputs,)}.get(need, tuple(weight.shape))
    if tuple(value.shape[-len(expected) :] if need == "gram" else value.shape) != expected:
        raise ConfigError(
            f"criterion {criterion!r}: {need} of shape {tuple(value.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}; measure again after every change of the model"
        )
    return value


def per_column(values: Tensor, weight: Tensor, output_dim: int) -> Tensor:
    """Spreads `values` of the columns, `[K]` or per group `[G, K]`, to the weight's shape (or one that broadcasts)."""
    inner = [size for dim, size in enumerate(weight.shape) if dim != output_dim]
    if values.ndim == 2:
        values = values.repeat_interleave(weight.shape[output_dim] // len(values), dim=0)
    return values.reshape(-1, *inner).movedim(0, output_dim)
