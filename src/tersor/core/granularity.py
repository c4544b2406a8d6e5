"""Which entries of a tensor share a scale.

Shapes: `R` regions, `N` entries of a region. A *grid* holds one number per region, in a shape that lies over the
tensor: the tensor's own shape with every shared dimension reduced.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from tersor.core.config import Config
from tersor.errors import ConfigError

Kind = Literal["tensor", "channel", "group", "token", "block"]
NEEDS: dict[Kind, tuple[bool, bool]] = {  # an axis, a size
    "tensor": (False, False),
    "channel": (True, False),
    "group": (True, True),
    "token": (False, False),
    "block": (False, True),
}


class Granularity(Config):
    """How a tensor is divided into regions, each with a scale of its own.

    | kind | a region is | grid of `[O, I, h, w]` |
    |---|---|---|
    | tensor | everything | `[1, 1, 1, 1]` |
    | channel | one index along `axis` | `[O, 1, 1, 1]` for axis 0 |
    | group | `size` neighbours along `axis` (Linear and convolution: axis 1 are the inputs) | `[O, I / size, h, w]` |
    | token | one vector along the last dimension | `[O, I, h, 1]` |
    | block | `size` consecutive entries of the flattened tensor; the last block may be shorter | `[R]` |
    """

    kind: Kind = "tensor"
    axis: int | None = None
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, needed, value in zip(("axis", "size"), NEEDS[self.kind], (self.axis, self.size), strict=True):
            if needed != (value is not None):
                raise ValueError(f"granularity {self.kind!r} {'needs' if needed else 'takes no'} {name}")
        return self

    @classmethod
    def channel(cls, axis: int = 0) -> Granularity:
        """One scale per index along `axis`: a layer's outputs are axis 0."""
        return cls(kind="channel", axis=axis)

    @classmethod
    def group(cls, size: int, axis: int = 1) -> Granularity:
        """One scale per `size` neighbours along `axis`: a layer's inputs are axis 1."""
        return cls(kind="group", axis=axis, size=size)

    @classmethod
    def token(cls) -> Granularity:
        """One scale per vector along the last dimension."""
        return cls(kind="token")

    @classmethod
    def block(cls, size: int) -> Granularity:
        """One scale per `size` consecutive entries, whatever the shape."""
        return cls(kind="block", size=size)

    @classmethod
    def of(cls, value: Granularity | str) -> Granularity:
        """Reads the short forms `tensor`, `channel` (axis 0) and `token`.

        Raises:
            ConfigError: for any other word.
        """
        if isinstance(value, Granularity):
            return value
        if value == "channel":
            return cls.channel()
        if value == "token":
            return cls.token()
        if value == "tensor":
            return cls()
        raise ConfigError(
            f"granularity: expected 'tensor', 'channel', 'token' or a Granularity, got {value!r}; "
            "groups have a size: Granularity.group(32) or Granularity.block(64)"
        )

    def grid_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the grid over a tensor of `shape`.

        Raises:
            ConfigError: if the tensor has no such axis, or groups do not divide it.
        """
        axis, size = self._axis(shape), self.size or 1
        if self.kind == "group" and shape[axis] % size:
            divisors = [divisor for divisor in range(2, shape[axis] + 1) if shape[axis] % divisor == 0]
            raise ConfigError(
                f"group size: expected a divisor of the {shape[axis]} entries along axis {axis} of a tensor of shape "
                f"{shape}, got {size}; take one of {divisors}, or Granularity.block({size}), whose last block may be "
                "shorter"
            )
        if self.kind == "block":
            return (math.ceil(math.prod(shape) / size),)
        kept = {
            "tensor": {},
            "channel": {axis: shape[axis] if shape else 1},
            "group": {dim: length // size if dim == axis else length for dim, length in enumerate(shape)},
            "token": dict(enumerate(shape[:-1])),
        }[self.kind]
        return tuple(kept.get(dim, 1) for dim in range(len(shape)))

    def rows(self, tensor: Tensor) -> Tensor:
        """The regions of a tensor as `[R, N]`; a short last block is filled up with zeros."""
        count = math.prod(self.grid_shape(tuple(tensor.shape)))
        if self.kind == "block":
            size = self.size or 1
            return functional.pad(tensor.flatten(), (0, count * size - tensor.numel())).reshape(count, size)
        if self.kind == "channel":
            tensor = tensor.movedim(self._axis(tuple(tensor.shape)), 0)
        elif self.kind == "group":
            tensor = tensor.movedim(self._axis(tuple(tensor.shape)), -1)
        return tensor.reshape(count, tensor.numel() // max(1, count))

    def restore(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor of `shape` whose regions are `rows`."""
        if self.kind == "block":
            return rows.flatten()[: math.prod(shape)].reshape(shape)
        if self.kind not in {"channel", "group"}:
            return rows.reshape(shape)
        axis, place = self._axis(shape), 0 if self.kind == "channel" else -1
        moved = [length for dim, length in enumerate(shape) if dim != axis]
        moved.insert(0 if place == 0 else len(moved), shape[axis])
        return rows.reshape(moved).movedim(place, axis)

    def grid(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Lays one value (or vector `[R, K]`) per region over a tensor of `shape`."""
        regions, rest = self.grid_shape(shape), values.shape[1:]
        if self.kind != "group":
            return values.reshape((*regions, *rest))
        axis = self._axis(shape)
        moved = [*regions[:axis], *regions[axis + 1 :], regions[axis]]
        return values.reshape((*moved, *rest)).movedim(len(shape) - 1, axis)

    def flat(self, grid: Tensor, shape: tuple[int, ...]) -> Tensor:
        """One value (or vector) per region, in the order of `rows`, from a grid."""
        dims = len(self.grid_shape(shape))
        if self.kind == "group":
            grid = grid.movedim(self._axis(shape), dims - 1)
        return grid.reshape((math.prod(grid.shape[:dims]), *grid.shape[dims:]))

    def _axis(self, shape: tuple[int, ...]) -> int:
        """The axis counted from the front; of kinds without one, 0."""
        if self.axis is None:
            return 0
        if not -len(shape) <= self.axis < len(shape):
            raise ConfigError(f"granularity {self}: expected an axis of a tensor of shape {shape}, got {self.axis}")
        return self.axis % len(shape)

    def __str__(self) -> str:
        """`per group of 32 along axis 1`."""
        size = "" if self.size is None else f" of {self.size}"
        return f"per {self.kind}{size}" + ("" if self.axis is None else f" along axis {self.axis}")
