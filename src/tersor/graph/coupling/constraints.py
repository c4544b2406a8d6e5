"""What must hold beyond the operators: sizes that one attribute gives, rectangles, layers that no run has reached."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.graph.coupling.integers import Attribute
from tersor.graph.coupling.labels import restrict, support
from tersor.graph.coupling.trace import Demand, Trace

Starts = Mapping[str, list[tuple[int, int]]]


def mirror_siblings(trace: Trace, tensors: Mapping[str, Tensor], starts: Starts) -> list[str]:
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


def follow_attributes(trace: Trace) -> None:
    """Sizes that one attribute gives are equal: the same positions go everywhere, or nothing does."""
    classes = torch.from_numpy(trace.ledger.classes())
    by_attribute: dict[Attribute, list[Demand]] = defaultdict(list)
    for demand in trace.demands:
        by_attribute[demand.attribute].append(demand)
    for attribute, demands in by_attribute.items():
        varying = [(block, demand.dim) for demand in demands for block in demand.varying(classes)]
        if len(varying) < len(demands):
            for block, _ in varying:
                trace.ledger.freeze(block, f"{attribute} also sizes something that is fixed")
            continue
        first, first_dim = varying[0]
        for block, dim in varying[1:]:
            if block.shape == first.shape and dim == first_dim:
                trace.ledger.unite(block, first)
                continue
            mine, other = restrict(trace.ledger, block, {dim})[0], restrict(trace.ledger, first, {first_dim})[0]
            if mine.numel() == other.numel():
                trace.ledger.unite(mine.flatten(), other.flatten())
            else:
                trace.ledger.freeze(first, f"{attribute} sizes different things")
                trace.ledger.freeze(block, f"{attribute} sizes different things")


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
            restrict(trace.ledger, block, {max(dims, key=lambda dim: block.shape[dim])})
