"""What must hold beyond the operators: sizes that one attribute gives, rectangles, layers that no run has reached."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tersor.graph.coupling.integers import Attribute
from tersor.graph.coupling.labels import Ledger, forbid, restrict, support, tie
from tersor.graph.coupling.trace import Demand, Trace

Starts = Mapping[str, list[tuple[int, int]]]


def mirror_siblings(trace: Trace, model: nn.Module, tensors: Mapping[str, Tensor], starts: Starts) -> list[str]:
    """Parameters that no run has read follow a sibling in the same list of modules (an expert); others are unused."""
    seen: dict[str, str] = {}
    role = {name: _role(model, name) for name in tensors}
    for name, tensor in tensors.items():
        if id(tensor) in trace.seen:
            seen.setdefault(role[name], name)
    unused = []
    for name, tensor in tensors.items():
        if id(tensor) in trace.seen:
            continue
        twin = seen.get(role[name])
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


def _role(model: nn.Module, name: str) -> str:
    """A parameter's name without the numbers of list members; `expert_3` in a `ModuleDict` is one, too."""
    role: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        numbered = part.isdecimal() or isinstance(module, nn.ModuleDict)
        role.append(re.sub(r"\d+$", "*", part) if numbered else part)
        module = None if module is None else module._modules.get(part)
    return ".".join(role)


def follow_attributes(trace: Trace) -> None:
    """Sizes that one attribute gives are equal: the same positions go everywhere, or nothing does."""
    ledger = trace.ledger
    classes = torch.from_numpy(ledger.classes())
    by_attribute: dict[Attribute, list[Demand]] = defaultdict(list)
    for demand in trace.demands:
        by_attribute[demand.attribute].append(demand)
    for attribute, demands in by_attribute.items():
        varying = [(block, demand.dim) for demand in demands for block in demand.varying(classes)]
        if len(varying) < len(demands):
            for block, dim in varying:
                forbid(ledger, (block,), dim, f"{attribute} also sizes something that is fixed")
            continue
        first, first_dim = min(varying, key=lambda pair: pair[0].shape[pair[1]])
        for block, dim in varying:
            if block.shape == first.shape and dim == first_dim:
                ledger.unite(block, first)
                continue
            mine, other = restrict(ledger, block, {dim})[0].flatten(), restrict(ledger, first, {first_dim})[0].flatten()
            if len(mine) % len(other):
                ledger.freeze(torch.cat([mine, other]), f"{attribute} sizes different things")
            else:
                _repeats(ledger, classes, mine, other)


def _repeats(ledger: Ledger, classes: Tensor, labels: Tensor, once: Tensor) -> None:
    """A dimension is a multiple of another: it holds the other several times, or every entry of it several times."""
    runs = labels.reshape(len(once), -1)
    numbers = classes[runs]
    if bool((numbers == numbers[:, :1]).all()) and runs.shape[1] > 1:
        ledger.unite(runs, once[:, None])
    else:
        ledger.unite(labels.reshape(-1, len(once)), once)


def settle_groups(trace: Trace) -> None:
    """Of grouped convolutions whole groups go, or the same positions of every group: whichever leaves more freedom."""
    ledger = trace.ledger
    for group in trace.grouped:
        inputs, outputs = group.inputs, group.outputs
        numbers = torch.from_numpy(ledger.classes())
        count, least = len(inputs), min(inputs.shape[1], outputs.shape[1])
        whole = _freedom([numbers[torch.cat([inputs, outputs], 1)]])
        same = _freedom([numbers[inputs].T, numbers[outputs].T])
        free = all(len(np.unique(numbers[part].numpy())) == part.numel() for part in (inputs, outputs))
        if least >= count if free else same >= whole:
            ledger.unite(inputs, inputs[:1])
            ledger.unite(outputs, outputs[:1])
            tie(ledger, inputs[0], group.own)
            continue
        ledger.unite(inputs, inputs[:, :1])
        ledger.unite(outputs, inputs[:, :1])
        if group.own is not None:
            ledger.freeze(group.own, "whole groups of a grouped convolution go")
        trace.require(group.number, (inputs[:, 0],), 0)


def _freedom(numbers: Sequence[Tensor]) -> int:
    """How many classes are left of the poorest part when the entries of every row go together."""
    ids, found = np.unique(torch.cat([part.flatten() for part in numbers]).numpy(), return_inverse=True)
    spots = np.split(found + 1, np.cumsum([part.numel() for part in numbers])[:-1])
    links = Ledger(len(ids) + 1)
    for part, labels in zip(numbers, spots, strict=True):
        rows = torch.from_numpy(labels).reshape(part.shape)
        links.unite(rows, rows[:, :1])
    classes = links.classes()
    return min(len(np.unique(classes[labels])) for labels in spots)


def keep_rectangular(trace: Trace) -> None:
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
            rows = {dim: _freedom([numbers.movedim(dim, 0).flatten(1)]) for dim in dims}
            restrict(trace.ledger, block, {max(dims, key=lambda dim: (rows[dim], dim))})
