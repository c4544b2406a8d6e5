"""Integers that remember where they come from.

A module that reshapes by `self.num_heads` must get a new `num_heads` when heads go. Which attribute that is cannot
be read off values (many things are 64), so during a trace the integer attributes of modules and of their
configuration objects are `Traced`, and so are the sizes that a tensor reports about itself. Arithmetic keeps the
origin as long as it only scales; anything else makes the number `derived`: computed from what may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

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
    """The size of a tensor's dimension.

    Attributes:
        labels: Of the dimension by itself; None if it is fixed or joined with others.
        joint: The block that joins it with others.
        dim: Which dimension of that block it is.
    """

    labels: Tensor | None
    joint: Tensor | None = None
    dim: int = 0

    @property
    def fixed(self) -> bool:
        """Whether nothing can be cut along the dimension."""
        return self.labels is None and self.joint is None


Origin = Attribute | Extent | None


class Traced(int):
    """An integer with an origin: `value = origin · scale`; without an origin it is derived.

    Attributes:
        origin: An attribute, or the size of a dimension.
        scale: What it is multiplied by.
        witness: Is told of any two that were compared and found equal: a model may insist on that.
    """

    origin: Origin
    scale: Fraction
    witness: ClassVar[Callable[[Traced, Traced], None] | None] = None

    def __new__(cls, value: int, origin: Origin = None, scale: Fraction = Fraction(1)) -> Traced:
        """Makes the number; `int` is immutable, so this is where its origin is set."""
        self = super().__new__(cls, value)
        self.origin, self.scale = origin, scale
        return self

    @property
    def constant(self) -> bool:
        """Whether it is the size of a dimension that is fixed: as good as a number, but not one of the code."""
        return isinstance(self.origin, Extent) and self.origin.fixed

    def _scaled(self, value: Any, other: Any, factor: Fraction) -> Any:
        if not isinstance(value, int):
            return value
        if self.origin is None or (isinstance(other, Traced) and not other.constant):
            return Traced(value)
        return Traced(value, self.origin, self.scale * factor)

    def __mul__(self, other: Any) -> Any:
        if self.constant and isinstance(other, Traced) and not other.constant:
            return other * self
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

    def __eq__(self, other: object) -> bool:
        self._witnessed(other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self._witnessed(other)
        return int.__ne__(self, other)

    def _witnessed(self, other: object) -> None:
        if isinstance(other, Traced) and Traced.witness is not None and int(self) == int(other):
            Traced.witness(self, other)

    __hash__ = int.__hash__

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


def _plain(value: Any) -> Any:
    """The value without origins; itself, if there are none."""
    if type(value) is Traced:
        return int(value)
    if type(value) is Shape or (type(value) in (tuple, list) and any(type(item) is Traced for item in value)):
        return (list if isinstance(value, list) else tuple)(_plain(item) for item in value)
    return value


@contextmanager
def traced_attributes(model: nn.Module) -> Iterator[None]:
    """Makes the public integer attributes of modules and configurations `Traced`, and restores them.

    What the model itself has set meanwhile stays, as plain integers: a cache goes with the length that it is for.
    """
    before: list[tuple[dict[str, Any], str, Any, Any]] = []
    held = list(owners(model))
    try:
        for owner, attributes in held:
            for name, value in list(attributes.items()):
                if name.startswith("_") or name == "training":
                    continue
                replaced = _traced(value, owner, name)
                if replaced is not value:
                    before.append((attributes, name, replaced, value))
                    attributes[name] = replaced
        yield
    finally:
        for attributes, name, replaced, value in before:
            if attributes.get(name) is replaced:
                attributes[name] = value
        for _, attributes in held:
            for name, value in attributes.items():
                if type(value) in (Traced, Shape, tuple, list):
                    attributes[name] = _plain(value)


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
