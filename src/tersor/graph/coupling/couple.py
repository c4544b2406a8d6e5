"""The coupling of a model: from one or more eager runs to families of units that can be removed.

Shapes: `U` units, `E` entries of one unit at one place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.graph.attention import prunable_attention
from tersor.graph.coupling.constraints import follow_attributes, keep_rectangular, mirror_siblings, settle_groups
from tersor.graph.coupling.family import Family, Frozen
from tersor.graph.coupling.groups import Array, group
from tersor.graph.coupling.integers import Attribute
from tersor.graph.coupling.labels import Ledger
from tersor.graph.coupling.rules import RULES, fallback
from tersor.graph.coupling.rules.pointwise import tensors_in
from tersor.graph.coupling.trace import Demand, Rule, Trace, observed

Run = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Coupling:
    """Which entries of which parameters go together, and what cannot go.

    Attributes:
        families: Units by family, in the order of the model's parameters.
        frozen: What cannot be removed, with the reason.
        unused: Parameters that no operator has read in the example runs; they are left alone.
        demands: Attributes that follow a size.
        classes: Label -> class; entries of one class go together.
        first_labels: Place, as text -> its first label.
    """

    families: tuple[Family, ...]
    frozen: tuple[Frozen, ...]
    unused: tuple[str, ...]
    demands: tuple[Demand, ...] = field(repr=False)
    classes: Array = field(repr=False)
    first_labels: Mapping[str, int] = field(repr=False)

    def __getitem__(self, name: str) -> Family:
        """A family by name."""
        for family in self.families:
            if family.name == name:
                return family
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [f"{len(self.families)} families, {sum(family.size for family in self.families)} units"]
        for family in self.families:
            places = ", ".join(str(place) for place in family.members if str(place) != family.name)
            lines.append(f"  {family.name}: {family.size} x {family.kind} -> {places}")
        lines += [f"  frozen {item.name}: {item.reason}" for item in self.frozen]
        lines += [f"  unused {name}" for name in self.unused]
        return "\n".join(lines)

    def classes_of(self, family: Family, units: Tensor) -> list[int]:
        """The classes of some of a family's units."""
        place, rows = next(iter(family.members.items()))
        labels = self.first_labels[str(place)] + rows[units, 0].numpy()
        return [int(number) for number in self.classes[labels]]

    def attributes_without(self, removed: Iterable[int]) -> dict[Attribute, int]:
        """Attribute -> its value once the classes `removed` are gone, where that differs."""
        mask = torch.from_numpy(~np.isin(self.classes, list(removed)))
        values: dict[Attribute, int] = {}
        for demand in self.demands:
            if demand.block is None:
                continue
            kept = mask[demand.block]
            others = [dim for dim in range(kept.ndim) if dim != demand.dim]
            size = int((kept.amax(others) if others else kept).sum())
            if size != demand.block.shape[demand.dim]:
                values[demand.attribute] = int(size / demand.scale)
        return values


def runs_of(example_inputs: Any) -> list[Run]:
    """Reads example inputs: a tensor, a tuple (positional), a dict (keywords), or a list of these (several runs)."""
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise ModelError("example inputs are an empty list; give at least one tensor, tuple or dict")
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
                outputs = run_alike(model, args, kwargs)
            trace.ledger.where = ""
            for out in () if prune_outputs else named_outputs(outputs):
                for block in trace.blocks(out):
                    trace.ledger.freeze(block, "it is an output of the model")
    finally:
        for module, mode in modes.items():
            module.training = mode
    if any(id(tensor) not in trace.seen for tensor in model.parameters()):
        _watch_training(trace, model, tensors, runs_of(example_inputs))
    trace.ledger.where = ""
    unused = mirror_siblings(trace, model, tensors, starts)
    follow_attributes(trace)
    settle_groups(trace)
    keep_rectangular(trace)
    follow_attributes(trace)
    keep_rectangular(trace)
    classes = trace.ledger.classes()
    families, frozen = group(model, tensors, starts, classes, trace.ledger.frozen(classes))
    return Coupling(
        families=tuple(families),
        frozen=tuple(frozen),
        unused=tuple(unused),
        demands=tuple(trace.demands),
        classes=classes,
        first_labels={f"{name}[{dim}]": start for name, dims in starts.items() for dim, start in dims},
    )


def _watch_training(trace: Trace, model: nn.Module, tensors: Mapping[str, Tensor], runs: Iterable[Run]) -> None:
    """What only training reads (the embedding of masked places) must fit as well; a copy of the model tells."""
    fresh = copy.deepcopy(model).train()
    for module in fresh.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    with trace.replaced(tensors, named_tensors(fresh)), suppress(ModelError):
        for args, kwargs in runs:
            with prunable_attention(fresh), observed(fresh, trace):
                run_alike(fresh, args, kwargs)


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


def run_alike(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`run_model` with the same random numbers every time, and on a copy of what is given: a cache in it would grow."""
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    try:
        given = copy.deepcopy((args, kwargs))
    except RuntimeError:  # a tensor with a history
        given = args, kwargs
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return run_model(model, *given)


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
