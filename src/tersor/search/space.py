"""The search space: what can be decided about a model, and what each layer is sized by.

A `Group` is one decision: a block goes or stays, a family of units keeps so many. A `Weight` is one parameter that
computes: its multiply-accumulates shrink with the families that size its rows and columns, and end with its block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from tersor.core.search import Choice
from tersor.errors import ConfigError

BLOCK = "block"
GroupKind = Literal["block", "channel", "head", "hidden", "width"]
Sizes = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Group:
    """One decision.

    Attributes:
        name: Path of the block, or name of the family.
        kind: `block`, or the family's kind.
        options: Units that may stay, the largest first: all of them. Of a block `(1, 0)`.
        inside: The block that holds every layer of the family; None if there is none. A skipped block leaves nothing
            to decide about what is inside.
    """

    name: str
    kind: GroupKind
    options: tuple[int, ...]
    inside: str | None = None


@dataclass(frozen=True)
class Weight:
    """One parameter that computes.

    Attributes:
        path: Of the parameter, such as `layer1.0.conv1.weight`.
        kind: What computes alike: operator, shape and work in the original model.
        macs: Multiply-accumulates at batch 1.
        outputs: Elements that its module answers with at batch 1.
        entries: Of the parameter.
        block: The block that it is in; None outside.
        rows: Families that own outputs, and the share of all outputs that each owns.
        columns: Likewise for inputs.
    """

    path: str
    kind: str
    macs: int
    outputs: int
    entries: int
    block: str | None = None
    rows: Sizes = ()
    columns: Sizes = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of everything that decides what it costs."""
        names = [*([self.block] if self.block else []), *(name for name, _ in (*self.rows, *self.columns))]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Space:
    """All decisions about one model.

    Attributes:
        groups: Blocks first, then families, in the order of the model.
        weights: In the order of the model.
        formats: Number formats that may be chosen; see `tersor.search.moves`.
        frozen: What cannot be decided, and why.
    """

    groups: tuple[Group, ...]
    weights: tuple[Weight, ...]
    formats: tuple[str, ...] = ("float32",)
    frozen: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        """Groups by name."""
        return {group.name: group for group in self.groups}

    @property
    def fingerprint(self) -> str:
        """What makes this space this space: a cost table of another one does not fit."""
        return hashlib.sha256(repr((self.groups, self.weights)).encode()).hexdigest()[:16]

    def choice(self, options: Mapping[str, int], format: str = "float32") -> Choice:
        """A choice from units that stay, by group; what is left out stays whole, and so is what is in skipped blocks.

        Raises:
            ConfigError: for unknown groups or formats, and numbers that are no option.
        """
        self._check(options, format)
        skipped = tuple(g.name for g in self.groups if g.kind == BLOCK and options.get(g.name, 1) == 0)
        widths = {
            g.name: options[g.name]
            for g in self.groups
            if g.kind != BLOCK and options.get(g.name, g.options[0]) != g.options[0] and g.inside not in skipped
        }
        return Choice(skipped=skipped, widths=widths, format=format)

    def options(self, choice: Choice) -> dict[str, int]:
        """Units that stay under a choice, of every group; of what is in skipped blocks all."""
        return {
            group.name: int(group.name not in choice.skipped)
            if group.kind == BLOCK
            else choice.widths.get(group.name, group.options[0])
            for group in self.groups
        }

    def shares(self, weight: Weight, options: Mapping[str, int]) -> tuple[float, float]:
        """Which parts of a weight's rows and columns stay; nothing of a skipped block's.

        Args:
            weight: Of this space.
            options: Units that stay, by group; whole where left out.
        """
        if weight.block is not None and options.get(weight.block, 1) == 0:
            return 0.0, 0.0
        return self._share(weight.rows, options), self._share(weight.columns, options)

    def macs(self, choice: Choice) -> float:
        """Multiply-accumulates at batch 1 of all weights together."""
        options = self.options(choice)
        return sum(weight.macs * rows * columns for weight, rows, columns in self._sized(options))

    def entries(self, choice: Choice) -> float:
        """Entries of all weights together."""
        options = self.options(choice)
        return sum(weight.entries * rows * columns for weight, rows, columns in self._sized(options))

    def _sized(self, options: Mapping[str, int]) -> list[tuple[Weight, float, float]]:
        return [(weight, *self.shares(weight, options)) for weight in self.weights]

    def _share(self, sizes: Sizes, options: Mapping[str, int]) -> float:
        gone = 0.0
        for name, part in sizes:
            whole = self.by_name[name].options[0]
            gone += part * (1 - options.get(name, whole) / whole)
        return 1 - gone

    def _check(self, options: Mapping[str, int], format: str) -> None:
        unknown = sorted(set(options) - set(self.by_name))
        if unknown:
            raise ConfigError(f"choice: the space has no {unknown}; it has {list(self.by_name)[:8]} …")
        for name, kept in options.items():
            if kept not in self.by_name[name].options:
                raise ConfigError(f"choice: of {name!r} {list(self.by_name[name].options)} may stay, got {kept!r}")
        if format not in self.formats:
            raise ConfigError(f"choice: expected a format of {list(self.formats)}, got {format!r}")
