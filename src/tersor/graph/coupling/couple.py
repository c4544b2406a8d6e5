"""The coupling of a model: from one or more eager runs to families of units that can be removed.

Shapes: `U` units, `E` entries of one unit at one place, `N` entries over all places.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.graph.attention import prunable_attention
from tersor.graph.coupling.family import Family, Frozen, Kind, Place
from tersor.graph.coupling.integers import Attribute
from tersor.graph.coupling.labels import Ledger, restrict, support
from tersor.graph.coupling.rules import RULES, fallback
from tersor.graph.coupling.rules.pointwise import tensors_in
from tersor.graph.coupling.trace import Demand, Rule, Trace, observed

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Coupling:
    """Which entries of which parameters go together, and what cannot go.

    Attributes:
        families: Units by family, in the order of the model's parameters.
        frozen: What cannot be removed, with the reason.
        unused: Parameters that no operator has read in the example runs; they are left alone.
    """

    families: tuple[Family, ...]
    frozen: tuple[Frozen, ...]
    unused: tuple[str, ...]
    demands: tuple[Demand, ...] = field(default=(), repr=False)
    numbers: Array | None = field(default=None, repr=False)  # label -> class
    owner: Mapping[str, int] = field(default_factory=dict, repr=False)  # place -> its first label

    def __getitem__(self, name: str) -> Family:
        """A family by name."""
        return next(family for family in self.families if family.name == name)

    def __str__(self) -> str:
        lines = [f"{len(self.families)} families, {sum(family.size for family in self.families)} units"]
        for family in self.families:
            places = ", ".join(str(place) for place in family.members if str(place) != family.name)
            lines.append(f"  {family.name}: {family.size} x {family.kind} -> {places}")
        lines += [f"  frozen {item.name}: {item.reason}" for item in self.frozen]
        lines += [f"  unused {name}" for name in self.unused]
        return "\n".join(lines)


def runs_of(example_inputs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Reads example inputs: a tensor, a tuple (positional), a dict (keywords), or a list of these (several runs)."""
    if isinstance(example_inputs, list):
        return [run for item in example_inputs for run in runs_of(item)]
    if isinstance(example_inputs, Mapping):
        return [((), dict(example_inputs))]
    return [(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {})]


def couple(
    model: nn.Module,
    example_inputs: Any,
    *,
    rules: Mapping[str, Rule] | None = None,
    prune_outputs: bool = False,
) -> Coupling:
    """Finds out which `(parameter, dimension, index)` entries of a model must go together.

    Runs the model once per example input, in evaluation mode and without gradients, and leaves it as it was.

    Args:
        model: Any module; no export, no tracing of its code.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keywords, or a list of several of
            these - give several where the data decides which part of the model runs.
        rules: Rules for operators of your own, e.g. `{"mylib.op": rule}`; they come before the built-in ones.
        prune_outputs: Whether the model's own outputs may shrink.

    Raises:
        ModelError: if the model does not run on the example inputs.
    """
    trace = Trace(Ledger(), {**RULES, **(rules or {})}, fallback)
    tensors = named_tensors(model)
    starts = trace.adopt(tensors)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for args, kwargs in runs_of(example_inputs):
            with prunable_attention(model), observed(model, trace):
                outputs = run_model(model, args, kwargs)
            trace.ledger.where = ""
            for out in () if prune_outputs else named_outputs(outputs):
                for block in trace.blocks(out):
                    trace.ledger.freeze(block, "it is an output of the model")
    finally:
        for module, mode in modes.items():
            module.training = mode
    trace.ledger.where = ""
    unused = _mirror(trace, tensors, starts)
    _rectangular(trace)
    _follow_attributes(trace)
    _rectangular(trace)
    return _collect(trace, model, tensors, starts, unused)


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the model; an error becomes a `ModelError` that says what was given."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        given = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in args]
        named = {name: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in kwargs.items()}
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs {given} {named or ''}: "
            f"{type(error).__name__}: {error}"
        ) from error


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def named_outputs(value: Any) -> list[Tensor]:
    """Tensors that the model returns; caches and other objects are not opened."""
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in named_outputs(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in named_outputs(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for item in vars(value).values() for tensor in named_outputs(item)]
    return tensors_in(value)


def _mirror(
    trace: Trace, tensors: Mapping[str, Tensor], starts: Mapping[str, list[tuple[int, int]]]
) -> list[str]:
    """Parameters that no run has read follow a sibling in the same list of modules (an expert); others are unused."""
    seen: dict[str, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) in trace.seen:
            seen.setdefault(re.sub(r"\.\d+\.", ".*.", name), name)
    unused = []
    for name, tensor in tensors.items():
        if id(tensor) in trace.seen:
            continue
        twin = seen.get(re.sub(r"\.\d+\.", ".*.", name))
        if twin is not None and tensors[twin].shape == tensor.shape:
            for (dim, mine), (_, other) in zip(starts[name], starts[twin], strict=True):
                size = tensor.shape[dim]
                trace.ledger.unite(torch.arange(mine, mine + size), torch.arange(other, other + size))
        else:
            for dim, start in starts[name]:
                labels = torch.arange(start, start + tensor.shape[dim])
                trace.ledger.freeze(labels, "" if tensor.ndim == 0 else "no operator has read it")
            if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
                unused.append(name)
    return unused


def _follow_attributes(trace: Trace) -> None:
    """Sizes that one attribute gives are equal: the same positions go everywhere, or nothing does."""
    classes = torch.from_numpy(trace.ledger.classes())
    by_attribute: dict[Attribute, list[Demand]] = defaultdict(list)
    for demand in trace.demands:
        by_attribute[demand.attribute].append(demand)
    for attribute, demands in by_attribute.items():
        varying = [demand for demand in demands if _varies(demand, classes)]
        if not varying:
            continue
        first = varying[0]
        assert first.block is not None
        if len(varying) < len(demands):
            for demand in varying:
                assert demand.block is not None
                trace.ledger.freeze(demand.block, f"{attribute} also sizes something that is fixed")
            continue
        for demand in varying[1:]:
            assert demand.block is not None
            if demand.block.shape == first.block.shape and demand.dim == first.dim:
                trace.ledger.unite(demand.block, first.block)
                continue
            mine = _vector(trace, demand)
            other = _vector(trace, first)
            if len(mine) == len(other):
                trace.ledger.unite(mine, other)
            else:
                trace.ledger.freeze(first.block, f"{attribute} sizes different things")
                trace.ledger.freeze(demand.block, f"{attribute} sizes different things")


def _varies(demand: Demand, classes: Tensor) -> bool:
    """Whether the size can change: whether the classes differ along the dimension."""
    if demand.block is None:
        return False
    numbers = classes[demand.block]
    return not bool((numbers == numbers.narrow(demand.dim, 0, 1)).all())


def _vector(trace: Trace, demand: Demand) -> Tensor:
    assert demand.block is not None
    return restrict(trace.ledger, demand.block, {demand.dim})[0].flatten()


def _rectangular(trace: Trace) -> None:
    """What is cut from a dimension that code splits must be a rectangle: whole rows, or the same of every row."""
    classes = torch.from_numpy(trace.ledger.classes())
    for block in trace.splits:
        numbers = classes[block]
        dims = sorted(support(block))
        whole = [
            dim
            for dim in dims
            if all(bool((numbers == numbers.narrow(other, 0, 1)).all()) for other in dims if other != dim)
        ]
        if not whole:
            restrict(trace.ledger, block, {max(dims, key=lambda dim: block.shape[dim])})


def _collect(
    trace: Trace,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    starts: Mapping[str, list[tuple[int, int]]],
    unused: list[str],
) -> Coupling:
    """Classes of labels become units; units that touch the same places become families."""
    classes = trace.ledger.classes()
    reasons = trace.ledger.frozen(classes)
    places: list[Place] = []
    owner: dict[str, int] = {}
    number_parts, place_parts, index_parts = [], [], []
    for name, dims in starts.items():
        for dim, start in dims:
            size = tensors[name].shape[dim]
            owner[f"{name}[{dim}]"] = start
            number_parts.append(classes[start : start + size])
            place_parts.append(np.full(size, len(places)))
            index_parts.append(np.arange(size))
            places.append(Place(name, dim))
    if not places:
        return Coupling((), (), tuple(unused))
    numbers, place_of, index_of = (np.concatenate(part) for part in (number_parts, place_parts, index_parts))
    order = np.lexsort((index_of, place_of, numbers))
    numbers, place_of, index_of = numbers[order], place_of[order], index_of[order]
    weights = np.random.default_rng(0).integers(1, 2**62, len(places), dtype=np.uint64)
    unique, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    signature = np.add.reduceat(weights[place_of], first)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, key in enumerate(signature.tolist()):
        groups[key].append(position)
    families, frozen = [], []
    taken: dict[str, int] = defaultdict(int)
    for positions in sorted(groups.values(), key=lambda positions: int(place_of[first[positions]].min())):
        span = slice(first[positions[0]], first[positions[0]] + counts[positions[0]])
        kinds, widths = np.unique(place_of[span], return_counts=True)
        rows = np.stack([index_of[first[p] : first[p] + counts[p]] for p in positions])
        edges = np.concatenate([[0], np.cumsum(widths)])
        members = {
            places[kind]: torch.from_numpy(rows[:, edges[i] : edges[i + 1]].copy()) for i, kind in enumerate(kinds)
        }
        stuck = [int(unique[p]) for p in positions if int(unique[p]) in reasons]
        name = _name(members, tensors)
        if stuck:
            reason = next((reasons[number] for number in stuck if reasons[number]), "")
            if reason:
                frozen.append(Frozen(name, reason))
            free = [row for row, p in enumerate(positions) if int(unique[p]) not in reasons]
            if not free:
                continue
            members = {place: rows_[free] for place, rows_ in members.items()}
        if len(next(iter(members.values()))) < 1 or all(isinstance_buffer(tensors[p.parameter]) for p in members):
            continue
        taken[name] += 1
        label = name if taken[name] == 1 else f"{name}#{taken[name]}"
        families.append(Family(label, _kind(members, tensors, model), _sorted(members)))
    return Coupling(
        tuple(families), tuple(dict.fromkeys(frozen)), tuple(unused), tuple(trace.demands), classes, owner
    )


def isinstance_buffer(tensor: Tensor) -> bool:
    """Whether a tensor is not learned."""
    return not isinstance(tensor, nn.Parameter)


def _sorted(members: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """Units by their first index at the first place."""
    order = next(iter(members.values()))[:, 0].argsort(stable=True)
    return {place: rows[order] for place, rows in members.items()}


def _name(members: Mapping[Place, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """The first weight that produces the units, else the first place."""
    producers = [place for place in members if place.dim == 0 and tensors[place.parameter].ndim > 1]
    return str((producers or list(members))[0])


def _kind(members: Mapping[Place, Tensor], tensors: Mapping[str, Tensor], model: nn.Module) -> Kind:
    modules = [model.get_submodule(place.parameter.rpartition(".")[0]) for place in members]
    if any(isinstance(module, nn.RNNBase | nn.RNNCellBase) and place.parameter.split(".")[-1].startswith("weight_hh")
           for place, module in zip(members, modules, strict=True)):
        return "hidden"
    if any(isinstance(module, nn.Embedding) for module in modules):
        return "width"
    matrices = [place for place in members if tensors[place.parameter].ndim == 2]
    producers = [place for place in matrices if place.dim == 0]
    if len(producers) > 1 and any(isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
                                  for module in modules) and len(producers) > 2:
        return "width"
    if producers and all(members[place].shape[1] > 1 for place in matrices) and len(matrices) > 1:
        return "head"
    return "channel"


def kept_sizes(coupling: Coupling, removed: Iterable[int]) -> dict[Attribute, int]:
    """Attribute -> new value once the classes `removed` are gone."""
    assert coupling.numbers is not None
    gone = np.zeros(len(coupling.numbers), dtype=bool)
    gone[np.isin(coupling.numbers, list(removed))] = True
    mask = torch.from_numpy(~gone)
    values: dict[Attribute, int] = {}
    for demand in coupling.demands:
        if demand.block is None:
            continue
        kept = mask[demand.block]
        others = [dim for dim in range(kept.ndim) if dim != demand.dim]
        alive = kept.amax(others) if others else kept
        size = int(alive.sum())
        if size != demand.block.shape[demand.dim]:
            values[demand.attribute] = int(size / demand.scale)
    return values


def classes_of(coupling: Coupling, family: Family, units: Tensor) -> list[int]:
    """The classes of some of a family's units."""
    assert coupling.numbers is not None
    place, rows = next(iter(family.members.items()))
    labels = coupling.owner[str(place)] + rows[units, 0].numpy()
    return [int(number) for number in coupling.numbers[labels]]
