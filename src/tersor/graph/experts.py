"""Mixtures of experts: found in a run, whatever the code and its names look like.

Where a run chooses, `routing.py` leads to the router: every parameter whose rows are the entries that are chosen from.
The experts are then what has as many members as the router has entries, in the smallest module that holds both: a
list of modules, or parameters that are read one row at a time.

Shapes: `E` experts, `G` groups, `N` entries of one expert at one place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tersor.graph.attention import prunable_attention
from tersor.graph.blocks import numbered
from tersor.graph.coupling.couple import Run, named_outputs, named_tensors, run_alike
from tersor.graph.coupling.family import Frozen, Place
from tersor.graph.coupling.groups import Array
from tersor.graph.coupling.integers import Attribute, owners, read_integer
from tersor.graph.coupling.labels import support
from tersor.graph.coupling.trace import observed
from tersor.graph.routing import Choice, Routing, routing


@dataclass(frozen=True)
class Mixture:
    """A router and its experts, numbered as the router's entries.

    Attributes:
        name: Path of the smallest module that holds both; of the model itself, its class.
        path: The same; empty for the model itself.
        size: Number of experts, `E`.
        least: How many must stay, so that the router still finds as many as it takes.
        groups: Experts of each group, if it chooses within groups; they stay of equal size.
        members: Place -> rows `[E, N]` of the router's and the experts' parameters.
        lists: Paths of lists of modules with one member per expert.
        attributes: That follow the number of experts, in proportion.
        followers: Such attributes of modules around it; they follow if all mixtures in there agree.
        labels: One of each expert, `[E]`.
        unread: Parameters and buffers of its modules that no run has read and that have as many entries.
    """

    name: str
    path: str
    size: int
    least: int
    groups: tuple[tuple[int, ...], ...]
    members: Mapping[Place, Tensor]
    lists: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    followers: tuple[Attribute, ...]
    labels: tuple[int, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Mixtures:
    """What a run shows.

    Attributes:
        found: In the order of the run.
        frozen: What chooses and is no mixture that can shrink, with the reason.
        classes: Label -> class, for the reference.
    """

    found: tuple[Mixture, ...]
    frozen: tuple[Frozen, ...]
    classes: Array

    def __getitem__(self, name: str) -> Mixture:
        """A mixture by name."""
        for mixture in self.found:
            if mixture.name == name:
                return mixture
        raise KeyError(name)


def find_mixtures(model: nn.Module, runs: Sequence[Run]) -> Mixtures:
    """Mixtures of experts of a model, and what looks like one but cannot shrink.

    Args:
        model: In evaluation mode; it stays as it is.
        runs: Arguments of the model.

    Raises:
        ModelError: if the model does not run.
    """
    trace = routing()
    tensors = named_tensors(model)
    starts = trace.adopt(tensors)
    shown: list[Tensor] = []
    for run in runs:
        with prunable_attention(model), observed(model, trace):
            outputs = run_alike(model, *run)
        shown += [block.flatten() for out in named_outputs(outputs) for block in trace.blocks(out)]
    classes = trace.ledger.classes()
    exposed = set(classes[torch.cat(shown).numpy()].tolist()) if shown else set()
    return _Finder(model, tensors, starts, trace, classes).mixtures(exposed)


class _Finder:
    """Reads a routing trace."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        starts: Mapping[str, list[tuple[int, int]]],
        trace: Routing,
        classes: Array,
    ) -> None:
        self.model, self.trace, self.classes = model, trace, classes
        self.places = {start: Place(name, dim) for name, dims in starts.items() for dim, start in dims}
        self.firsts = np.array(list(self.places))
        self.tensors = tensors
        self.owned = np.zeros(int(classes.max()) + 1, dtype=bool)  # classes that some parameter is part of
        self.owned[classes[1 : trace.learned]] = True
        self.lists = {path: len(part) for path, part in model.named_modules() if numbered(part)}
        self.paths = sorted(
            (path for path, _ in model.named_modules()), key=lambda path: -len(path.split(".")) * bool(path)
        )
        self.names: dict[int, list[str]] = defaultdict(list)  # a tied parameter has several
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self.names[id(tensor)].append(name)
        self.picked = self._picked()
        self.frozen: list[Frozen] = []

    def _picked(self) -> dict[tuple[Place, int], Tensor]:
        """(Place, members) -> rows `[members, N]` of parameters that are read one row at a time."""
        found = {}
        for labels in self.trace.picked:
            first = self.firsts[np.searchsorted(self.firsts, int(labels.min()), side="right") - 1]
            place = self.places[int(first)]
            if int(labels.min()) > 0 and int(labels.max()) < first + self.tensors[place.parameter].shape[place.dim]:
                found[place, len(labels)] = labels - int(first)
        return found

    def mixtures(self, exposed: set[int]) -> Mixtures:
        """All of them."""
        by_classes: dict[frozenset[int], list[Choice]] = defaultdict(list)
        for choice in self.trace.choices:
            found = self._numbers(choice)
            if not found or not self.owned[found].all():
                self._freeze(choice, f"{choice.operator} chooses from {choice.size} entries that no parameter gives")
            elif len(set(found)) < len(found):
                self._freeze(choice, "the entries that it chooses from go together")
            else:
                by_classes[frozenset(found)].append(choice)
        mixtures = [mixture for choices in by_classes.values() for mixture in self._mixture(choices, exposed)]
        return Mixtures(tuple(self._apart(mixtures)), tuple(dict.fromkeys(self.frozen)), self.classes)

    def _numbers(self, choice: Choice) -> list[int]:
        return [] if choice.entries is None else self.classes[choice.entries.numpy()].flatten().tolist()

    def _labels(self, members: Mapping[Place, Tensor]) -> tuple[int, ...]:
        place, rows = next(iter(members.items()))
        start = next(start for start, other in self.places.items() if other == place)
        return tuple((start + rows[:, 0]).tolist())

    def _within(self, place: Place, path: str) -> bool:
        names = self.names.get(id(self.tensors[place.parameter]), [place.parameter])
        return any(inside(name, path) for name in names)

    def _unread(self, path: str, lists: Sequence[str], size: int) -> Iterator[str]:
        for name, tensor in self.tensors.items():
            alike = size in tensor.shape and id(tensor) not in self.trace.seen
            if alike and inside(name, path) and not any(inside(name, part) for part in lists):
                yield name

    def _freeze(self, choice: Choice, reason: str) -> None:
        self.frozen.append(Frozen(choice.where or type(self.model).__name__, reason))

    def _mixture(self, choices: Sequence[Choice], exposed: set[int]) -> Iterator[Mixture]:
        first = min(choices, key=lambda choice: not choice.flat)
        order = self._numbers(first)
        members = self._rows(order)
        if members is None:
            self._freeze(first, "a parameter holds entries of some of its experts only")
            return
        bank = self._bank(members, len(order))
        if bank is None:
            self._freeze(first, f"it chooses from {len(order)} entries, and nothing near it has as many members")
            return
        path, lists, picked = bank
        groups, least = _limits(choices, {number: expert for expert, number in enumerate(order)}, self.classes)
        mixture = Mixture(
            name=path or type(self.model).__name__,
            path=path,
            size=len(order),
            least=least,
            groups=groups,
            members={**members, **picked},
            lists=lists,
            attributes=(),
            followers=(),
            labels=self._labels(members),
            unread=tuple(self._unread(path, lists, len(order))),
        )
        if exposed & set(order):
            self.frozen.append(Frozen(mixture.name, "its router's scores are an output of the model"))
            return
        counts = _Counts(self, mixture, order)
        attributes, clash = counts.found()
        if clash is not None:
            self.frozen.append(Frozen(mixture.name, f"{clash} also sizes something else"))
            return
        followers = tuple(attribute for attribute in counts.around() if attribute not in attributes)
        yield replace(mixture, attributes=tuple(attributes), followers=followers)

    def _rows(self, order: Sequence[int]) -> dict[Place, Tensor] | None:
        """Place -> rows `[E, N]` of everything that goes with the router's entries; None if some have none."""
        expert = np.full(len(self.owned), -1)
        expert[list(order)] = np.arange(len(order))
        members = {}
        for start, place in self.places.items():
            size = self.tensors[place.parameter].shape[place.dim]
            numbers = expert[self.classes[start : start + size]]
            if (numbers < 0).all():
                continue
            counts = np.bincount(numbers[numbers >= 0], minlength=len(order))
            if counts.min() != counts.max():
                return None
            rows = np.flatnonzero(numbers >= 0)
            ordered = rows[np.argsort(numbers[rows], kind="stable")]
            members[place] = torch.from_numpy(ordered.reshape(len(order), -1))
        return members

    def _bank(
        self, members: Mapping[Place, Tensor], size: int
    ) -> tuple[str, tuple[str, ...], dict[Place, Tensor]] | None:
        """The smallest module around the router that holds experts, the lists and the parameters that are experts."""
        stacked = any(self.tensors[place.parameter].ndim > 2 for place in members)  # all experts in one product
        for path in self.paths:
            if not all(self._within(place, path) for place in members):
                continue
            lists = [
                name
                for name, count in self.lists.items()
                if count == size and inside(name, path) and not any(self._within(place, name) for place in members)
            ]
            lists = [name for name in lists if not any(name != other and inside(name, other) for other in lists)]
            picked = {
                place: rows
                for (place, count), rows in self.picked.items()
                if count == size
                and self._within(place, path)
                and place not in members
                and not any(self._within(place, name) for name in lists)
            }
            if lists or picked or stacked:
                return path, tuple(lists), picked
        return None

    def _apart(self, mixtures: Sequence[Mixture]) -> Iterator[Mixture]:
        """Those that share nothing with another one."""
        for mixture in mixtures:
            parts = {*mixture.lists, *mixture.members}
            others = [other for other in mixtures if other is not mixture]
            shared = [other.name for other in others if parts & {*other.lists, *other.members}]
            around = [other.name for other in others if any(inside(mixture.path, name) for name in other.lists)]
            if shared:
                self.frozen.append(Frozen(mixture.name, f"another router chooses from its experts ({shared[0]})"))
            elif around:
                self.frozen.append(Frozen(mixture.name, f"it is part of an expert of {around[0]}"))
            elif any(other.name == mixture.name for other in others):
                self.frozen.append(Frozen(mixture.name, "it has several routers with experts of their own"))
            else:
                yield mixture


def inside(path: str, around: str) -> bool:
    """Whether a module or parameter is in a module, or is it."""
    return not around or path == around or path.startswith(f"{around}.")


def _limits(
    choices: Sequence[Choice], experts: Mapping[int, int], classes: Array
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Experts of each group, if there are groups, and how many experts must stay."""
    taken = max([choice.count for choice in choices if choice.flat] or [1])
    within = [choice for choice in choices if choice.groups is None and not choice.flat]
    if not within or within[0].labels is None:
        return (), taken
    rows = classes[within[0].labels.flatten(0, -2).numpy()]
    groups = tuple(tuple(experts[int(number)] for number in row) for row in rows)
    open_groups = min([choice.count for choice in choices if choice.groups is not None] or [len(groups)])
    each = max([math.ceil(taken / open_groups), *(choice.count for choice in within)])
    return groups, each * len(groups)


class _Counts:
    """Which integer attributes follow the number of a mixture's experts.

    Those that the run shows to size something by it, and those whose name says so and whose value is the number. A
    value alone says nothing: a layer's number may be the same.
    """

    def __init__(self, finder: _Finder, mixture: Mixture, order: Sequence[int]) -> None:
        self.model, self.trace, self.mixture = finder.model, finder.trace, mixture
        mine = np.zeros(len(finder.owned), dtype=bool)
        mine[list(order)] = True
        self.sized: set[Attribute] = set()
        self.other: set[Attribute] = set(finder.trace.counts)
        for demand in finder.trace.demands:
            if demand.block is None:
                continue
            numbers = finder.classes[demand.block.numpy()]
            if mine[numbers].all():
                outer = demand.dim != max(support(demand.block))
                (self.other if outer else self.sized).add(demand.attribute)  # the number of groups stays
            elif finder.owned[numbers].any():
                self.other.add(demand.attribute)

    def found(self) -> tuple[list[Attribute], Attribute | None]:
        """The attributes; and one that cannot follow, if there is one."""
        clash = next((attribute for attribute in sorted(self.sized & self.other, key=str)), None)
        holders, size = dict(owners(self.model)), self.mixture.size
        counted = {
            attribute
            for attribute, where in self.trace.given
            if inside(where, self.mixture.path) and read_integer(holders[attribute.owner], attribute) == size
        }
        held = {
            Attribute(path, name)
            for path, module in self.model.named_modules()
            if inside(path, self.mixture.path)
            and not any(path != name and inside(path, name) for name in self.mixture.lists)
            for name in _named(module, size)
        }
        return sorted(self.sized | ((counted | held) - self.other), key=str), clash

    def around(self) -> Iterator[Attribute]:
        """The same in modules that hold the mixture."""
        for path, module in self.model.named_modules():
            if path != self.mixture.path and inside(self.mixture.path, path):
                for name in _named(module, self.mixture.size):
                    if Attribute(path, name) not in self.other:
                        yield Attribute(path, name)


def _named(module: nn.Module, size: int) -> list[str]:
    """Integers of this value that are called a number of experts, and not of those that every token sees."""
    return [
        name
        for name, value in vars(module).items()
        if type(value) is int and value == size and name.endswith(("experts", "expert")) and "shared" not in name
    ]
