"""The form of a rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComputeRule:
    """Where an operator's operands stand among its arguments.

    Attributes:
        activations: Positions of the operands that vary with the input.
        weight: Position of the weight, None without.
        bias: Position of the bias, None without.
        channel_axis: Dimension of the weight that is the output channel.
    """

    activations: tuple[int, ...]
    weight: int | None = None
    bias: int | None = None
    channel_axis: int = 0
