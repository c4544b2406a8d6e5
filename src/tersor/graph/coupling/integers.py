"""Integers that remember where they come from.

A module that reshapes by `self.num_heads` must get a new `num_heads` when heads go. Which attribute that is cannot
be read off values (many things are 64), so during a trace the integer attributes of modules and of their
configuration objects are `Traced`, and so are the sizes that a tensor reports about itself. Arithmetic keeps the
origin as long as it only scales; anything else makes the number `derived`: computed from what may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor, nn


class Attribute(NamedTuple):
    """An integer attribute: `owner` is a module's path, or `<path>.config`; `position` is inside a tuple or list."""

    owner: str
    name: str
    position: int | None = None

    def __str__(self) -> str:
        spot = "" if self.position is None else f"[{self.position}]"
        return f"{self.owner}.{self.name}{spot}".lstrip(".")


@dataclass(frozen=True)
class Extent:
    """The size of a tensor's dimension: its labels, None if it is fixed or joined with others."""

    labels: Tensor | None
    fixed: bool


Origin = Attribute | Extent | None


class Traced(int):
    """An integer with an origin: `value = origin · scale`; without an origin it is derived."""

    origin: Origin
    scale: Fraction

    def __new__(cls, value: int, origin: Origin = None, scale: Fraction = Fraction(1)) -> Traced:
        """Makes the number; `int` is immutable, so this is where its origin is set."""
        self = super().__new__(cls, value)
        self.origin, self.scale = origin, scale
        return self

    def _scaled(self, value: Any, other: Any, factor: Fraction) -> Any:
        if not isinstance(value, int):
            return value
        if isinstance(other, Traced) or self.origin is None:
            return Traced(value)
        return Traced(value, self.origin, self.scale * factor)

    def __mul__(self, other: Any) -> Any:
        value = int(self) * (int(other) if isinstance(other, Traced) else other)
        return self._scaled(value, other, Fraction(other)) if isinstance(other, int) else value

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int(self) // (int(other) if isinstance(other, Traced) else other)
        if not isinstance(other, int):
            return value
        if self.origin is not None and value * int(other) != int(self):
            return Traced(value)
        return self._scaled(value, other, Fraction(1, int(other)))

    def __rfloordiv__(self, other: Any) -> Any:
        return _derived(other // int(self))

    def __add__(self, other: Any) -> Any:
        return _derived(int(self) + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _derived(int(self) - other)

    def __rsub__(self, other: Any) -> Any:
        return _derived(other - int(self))

    def __neg__(self) -> Any:
        return Traced(-int(self), self.origin, -self.scale)

    def __mod__(self, other: Any) -> Any:
        return int(self) % other

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _derived(value: Any) -> Any:
    return Traced(value) if isinstance(value, int) else value


class Shape(tuple[int, ...]):
    """What `tensor.shape` answers during a trace: `torch.Size` would turn its entries into plain integers."""

    __slots__ = ()

    def numel(self) -> int:
        """Product of the sizes."""
        total = 1
        for size in self:
            total = size * total
        return total


def is_config(value: Any) -> bool:
    """Whether an attribute of a module is a configuration object, such as Hugging Face models carry."""
    return type(value).__name__.endswith("Config") and hasattr(value, "__dict__")


def owners(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and attribute dictionary of every module and, once each, of every configuration object."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield path, module.__dict__
        for name, value in list(module.__dict__.items()):
            if is_config(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}".lstrip("."), value.__dict__


def _traced(value: Any, owner: str, name: str) -> Any:
    if type(value) is int and value > 1:
        return Traced(value, Attribute(owner, name))
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(
            Traced(item, Attribute(owner, name, index)) if item > 1 else item for index, item in enumerate(value)
        )
    return value


@contextmanager
def traced_attributes(model: nn.Module) -> Iterator[None]:
    """Makes the public integer attributes of modules and configurations `Traced`, and restores them."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, attributes in owners(model):
            for name, value in list(attributes.items()):
                if name.startswith("_") or name == "training":
                    continue
                replaced = _traced(value, owner, name)
                if replaced is not value:
                    before.append((attributes, name, value))
                    attributes[name] = replaced
        yield
    finally:
        for attributes, name, value in before:
            attributes[name] = value


def write_integer(holder: dict[str, Any], attribute: Attribute, value: int) -> None:
    """Writes an attribute into its owner's dictionary."""
    if attribute.position is None:
        holder[attribute.name] = value
    else:
        items = list(holder[attribute.name])
        items[attribute.position] = value
        holder[attribute.name] = type(holder[attribute.name])(items)


def read_integer(holder: Mapping[str, Any], attribute: Attribute) -> Any:
    """Reads an attribute from its owner's dictionary."""
    value = holder[attribute.name]
    return value if attribute.position is None else value[attribute.position]
