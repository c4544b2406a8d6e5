"""What goes together: units, and families of alike units.

Shapes: `U` units of a family, `E` entries of one unit at one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["channel", "head", "hidden", "width"]


class Place(NamedTuple):
    """One dimension of one parameter or buffer, e.g. `("layer1.0.conv1.weight", 0)`."""

    parameter: str
    dim: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}]"


class Frozen(NamedTuple):
    """What cannot be removed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Family:
    """Units that touch the same places with the same number of entries each; any of them can go on its own.

    Example:
        A convolution with 8 outputs, its BatchNorm, and the linear layer behind a flatten of 2 x 2 pixels::

            members = {("conv.weight", 0): [[0], [1], … [7]],
                       ("norm.weight", 0): [[0], [1], … [7]], …
                       ("head.weight", 1): [[0, 1, 2, 3], [4, 5, 6, 7], … [28, 29, 30, 31]]}

    Attributes:
        name: The first weight that produces the units, and its dimension.
        kind: `channel` (also neurons of a feed-forward layer), `head` (attention heads with their keys and
            values), `hidden` (units of a recurrent layer), `width` (the residual stream).
        members: Place -> indices `[U, E]`, int64; unit `u` owns `members[place][u]`.
    """

    name: str
    kind: Kind
    members: Mapping[Place, Tensor]

    @property
    def size(self) -> int:
        """Number of units, `U`."""
        return len(next(iter(self.members.values())))
