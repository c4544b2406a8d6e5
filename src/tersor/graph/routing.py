"""Routing as a run shows it: which dimension a model chooses from, and the run in which some entries are never chosen.

A router is whatever sizes the dimension along which `topk`, `argmax` or `max` choose. The label tracer leads from there
back to its parameters, through softmax, sigmoid and sums. Coupling freezes such dimensions, because a softmax over
fewer entries is another softmax; here the reference takes it over fewer entries as well.

Shapes: `E` experts, `G` groups of equal size, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.graph.coupling.groups import Array
from tersor.graph.coupling.integers import Attribute, Traced
from tersor.graph.coupling.labels import FIXED, Blocks, Ledger, along, support
from tersor.graph.coupling.rules import RULES, fallback
from tersor.graph.coupling.trace import Call, Rule, Trace
from tersor.graph.reference import Masked, without_masked

CHOOSING = {"aten.topk": 2, "aten.argmax": 1, "aten.max": 1}  # position of the dimension
SOFTMAX = {"aten._softmax", "aten._log_softmax", "aten._safe_softmax"}
# Functions to which an integer says how many there are of something.
SIZING = {"arange", "bincount", "empty", "full", "histc", "new_empty", "new_full", "new_ones", "new_zeros", "one_hot"}
SIZING |= {"ones", "zeros"}


@dataclass
class Apart(Ledger):
    """A ledger that never lets two entries of one dimension become one: experts go one by one, or not at all.

    Of what operators say it believes what pairs two dimensions one to one. The rest (a mask that covers a group, an
    entry that is looked up) is about other things than which rows belong to one expert.
    """

    _starts: list[int] = field(default_factory=lambda: [0, 1])
    _bounds: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def fresh(self, size: int) -> Tensor:
        """New labels, `[size]`, of a dimension of their own."""
        self._starts.append(self.count + size)
        return super().fresh(size)

    def unite(self, left: Tensor, right: Tensor) -> None:
        """As `Ledger.unite`, for pairs that are one to one and of two dimensions."""
        first, second = (part.flatten().numpy() for part in torch.broadcast_tensors(left, right))  # type: ignore[no-untyped-call]
        pairs = np.unique(first * self.count + second)
        first, second = pairs // self.count, pairs % self.count
        keep = (first != FIXED) & (second != FIXED) & (self._owner(first) != self._owner(second))
        for labels in (first, second):
            _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
            keep &= counts[places] == 1
        if keep.any():
            super().unite(torch.from_numpy(first[keep]), torch.from_numpy(second[keep]))

    def _owner(self, labels: Array) -> Array:
        if len(self._bounds) != len(self._starts):
            self._bounds = np.array(self._starts)
        return np.searchsorted(self._bounds, labels, side="right")


@dataclass(frozen=True)
class Choice:
    """One operator that chooses.

    Attributes:
        labels: Of what it chooses from, `[…, size]`; with more than one dimension it chooses within groups. None if
            no parameter gives the dimension.
        size: Entries of the dimension.
        count: How many it takes.
        where: Path of the module.
        operator: Its name.
        groups: What it chooses from are the groups of these labels, `[G, E / G]`.
    """

    labels: Tensor | None
    size: int
    count: int
    where: str
    operator: str
    groups: Tensor | None = None

    @property
    def entries(self) -> Tensor | None:
        """Labels of the single entries that it is about in the end, `[E]` or `[G, E / G]`."""
        return self.labels if self.groups is None else self.groups

    @property
    def flat(self) -> bool:
        """Whether it chooses from all entries alike."""
        return self.groups is None and self.labels is not None and self.labels.ndim == 1


@dataclass
class Routing(Trace):
    """A trace that takes down what is chosen from what.

    Attributes:
        choices: In the order of the run.
        picked: Label matrices `[size, N]` of dimensions whose entries are used one by one: by number, by data, or in a
            batch of products.
        counts: Attributes that are the `k` of a `topk`.
        given: Attributes that told an author's call how many there are of something, with the path of the module.
        chosen: Told `(labels [E], scores [T, E], numbers [T, k])` of every choice that is not within groups.
    """

    choices: list[Choice] = field(default_factory=list)
    picked: list[Tensor] = field(default_factory=list)
    counts: set[Attribute] = field(default_factory=set)
    given: set[tuple[Attribute, str]] = field(default_factory=set)
    chosen: Callable[[Tensor, Tensor, Tensor], None] | None = None
    _groups: dict[int, Tensor] = field(default_factory=dict)

    def take_down(self, values: Tensor, dim: int, call: Call) -> Blocks:
        """Records a choice along a dimension; returns the blocks of what is taken."""
        blocks = self.blocks(values)
        block = next((block for block in blocks if dim in support(block)), None)
        count = int(call.args[1]) if call.name == "aten.topk" else 1
        where, size = self.modules[-1] if self.modules else "", values.shape[dim]
        if call.name == "aten.topk":
            self.counts |= _attributes(self)
        if block is None:
            if values.is_floating_point() and size > 1 and call.name != "aten.max":  # most want the value only
                self.choices.append(Choice(None, size, count, where, call.name))
            return blocks
        outer = sorted(support(block) - {dim})
        labels = block.movedim(dim, -1).reshape([*(block.shape[other] for other in outer), size])
        groups = self._groups.get(int(labels.flatten()[0]))
        self.choices.append(Choice(labels, size, count, where, call.name, groups))
        if self.chosen is not None and labels.ndim == 1:
            numbers = call.out[1] if isinstance(call.out, tuple | list) else call.out
            if numbers.ndim < values.ndim:
                numbers = numbers.unsqueeze(dim)
            flat = (values.movedim(dim, -1).reshape(-1, size), numbers.movedim(dim, -1).reshape(-1, count))
            self.chosen(labels, *flat)
        rest = tuple(other for other in blocks if other is not block)
        if len(outer) != 1:
            return rest
        fresh = self.ledger.fresh(block.shape[outer[0]])
        self._groups[int(fresh[0])] = labels
        return (*rest, *along(fresh, outer[0], values.ndim))

    def pick(self, source: Tensor, dim: int) -> None:
        """Takes down that the entries of a dimension are read one by one."""
        for block in self.blocks(source):
            if dim in support(block) and bool((block < self.learned).all()):
                self.picked.append(block.movedim(dim, 0).reshape(block.shape[dim], -1))


def _attributes(trace: Trace) -> set[Attribute]:
    """Attributes that the author's call at work was given as they are."""
    numbers = trace.function[1] if trace.function is not None else []
    return {
        number.origin
        for number in numbers
        if isinstance(number, Traced) and isinstance(number.origin, Attribute) and number.scale == 1
    }


def choose(trace: Trace, call: Call) -> None:
    """`topk`, `argmax`, `max`: takes some entries of a dimension, wherever they stand."""
    dim, paired = _dimension(call.name, call.args, call.kwargs), isinstance(call.out, tuple | list)
    if dim is None or (call.name == "aten.max" and not paired):  # the largest of all
        RULES[call.name](trace, call)
        return
    values, blocks = call.args[0], _routing(trace).take_down(call.args[0], dim, call)
    for out in call.out if paired else [call.out]:
        dropped = out.ndim < values.ndim
        trace.put(out, tuple(block.squeeze(dim) if dropped else block for block in blocks))


def _dimension(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Along which an operator chooses or normalises."""
    position = CHOOSING.get(name, 1)
    dim = args[position] if len(args) > position else kwargs.get("dim", -1 if name == "aten.topk" else None)
    return dim % max(args[0].ndim, 1) if isinstance(dim, int) and not isinstance(dim, bool) else None


def _routing(trace: Trace) -> Routing:
    if not isinstance(trace, Routing):
        raise TypeError("only a routing trace takes down what is chosen")
    return trace


def keep(trace: Trace, call: Call) -> None:
    """What has the labels of its first argument, here: a softmax, a copy with some entries overwritten."""
    trace.put(call.out, trace.blocks(call.args[0]))


def _reading(rule: Rule, dims: Callable[[Call], Iterable[tuple[Tensor, int]]]) -> Rule:
    """A built-in rule that also takes down which dimensions are read one by one."""

    def reads(trace: Trace, call: Call) -> None:
        for source, dim in dims(call):
            _routing(trace).pick(source, dim)
        rule(trace, call)

    return reads


def _indexed(call: Call) -> Iterator[tuple[Tensor, int]]:
    dim = 0
    for index in call.args[1]:
        if index is not None and index.dtype in (torch.int64, torch.int32):
            yield call.args[0], dim
        dim += index.ndim if index is not None and index.dtype == torch.bool else 1


def _one(call: Call) -> Iterator[tuple[Tensor, int]]:
    dim = call.argument(1, "dim", 0)
    yield call.args[0], int(dim) % max(call.args[0].ndim, 1)


def _batched(call: Call) -> Iterator[tuple[Tensor, int]]:
    for source in call.args[:2]:
        if source.ndim == 3:
            yield source, 0


ROUTING: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(CHOOSING, choose),
    **dict.fromkeys(SOFTMAX, keep),
    "aten.scatter": keep,
    "aten.index": _reading(RULES["aten.index"], _indexed),
    **{name: _reading(RULES[name], _one) for name in ("aten.select", "aten.index_select", "aten.unbind")},
    **{name: _reading(RULES[name], _batched) for name in ("aten.bmm", "aten._grouped_mm")},
}


def watch(trace: Trace, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Takes down which attributes say how many there are of something; computes nothing."""
    if trace.function is not None and trace.function[0] in SIZING:
        where = trace.modules[-1] if trace.modules else ""
        _routing(trace).given |= {(attribute, where) for attribute in _attributes(trace)}
    return NotImplemented


def routing() -> Routing:
    """A new trace."""
    return Routing(Apart(), ROUTING, fallback, before=watch)


class _Barred(Masked, Routing):
    """A routing trace that knows who may not be chosen."""


def barred(gone: Iterable[int], classes: Array) -> Trace:
    """A trace under which a model runs as if the entries of some classes could not be chosen.

    Where an operator chooses, and in a softmax, their scores are `-inf`; other statistics run over those that stay.

    Args:
        gone: Numbers of classes.
        classes: Label -> class, of the same model under `routing`.
    """
    trace = _Barred(Apart(), ROUTING, fallback, before=_bar)
    trace.numbers = classes
    trace.gone = np.zeros(int(classes.max()) + 1, dtype=bool)
    trace.gone[list(gone)] = True
    return trace


def _bar(trace: Trace, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    dim = _dimension(name, args, kwargs) if name in CHOOSING or name in SOFTMAX else None
    if dim is None or not isinstance(trace, Masked):
        return without_masked(trace, name, func, args, kwargs)
    for block in trace.blocks(args[0]):
        alive = trace.alive(block)
        if dim in support(block) and not bool(alive.all()):
            return func(args[0].masked_fill(~alive, float("-inf")), *args[1:], **kwargs)
    return NotImplemented
