"""From classes of labels to units, from units to families.

Shapes: `U` units, `E` entries of one unit at one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.graph.coupling.constraints import Starts
from tersor.graph.coupling.family import Family, Frozen, Kind, Place

Array = np.ndarray[Any, np.dtype[Any]]


def group(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    starts: Starts,
    classes: Array,
    reasons: Mapping[int, str],
) -> tuple[list[Family], list[Frozen]]:
    """Families of the classes that may go, and what is frozen.

    Args:
        model: Tells the kinds of units by its modules.
        tensors: Parameters and buffers by name.
        starts: Name -> `(dimension, its first label)`.
        classes: Label -> class.
        reasons: Class -> why it is frozen.
    """
    places: list[Place] = []
    number_parts, place_parts, index_parts = [], [], []
    for name, dims in starts.items():
        for dim, start in dims:
            size = tensors[name].shape[dim]
            number_parts.append(classes[start : start + size])
            place_parts.append(np.full(size, len(places)))
            index_parts.append(np.arange(size))
            places.append(Place(name, dim))
    if not places:
        return [], []
    numbers, place_of, index_of = (np.concatenate(part) for part in (number_parts, place_parts, index_parts))
    order = np.lexsort((index_of, place_of, numbers))
    numbers, place_of, index_of = numbers[order], place_of[order], index_of[order]
    unique, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    families: list[Family] = []
    frozen: dict[Frozen, None] = {}
    taken: dict[str, int] = defaultdict(int)
    for alike in _alike(place_of, first, len(places)):
        rows = np.stack([index_of[first[p] : first[p] + counts[p]] for p in alike])
        kinds, widths = np.unique(place_of[first[alike[0]] : first[alike[0]] + counts[alike[0]]], return_counts=True)
        edges = np.cumsum([0, *widths])
        members = {
            places[kind]: torch.from_numpy(rows[:, edges[i] : edges[i + 1]].copy()) for i, kind in enumerate(kinds)
        }
        name = _name(members, tensors)
        stuck = [reasons[number] for number in unique[alike].tolist() if number in reasons]
        free = [row for row, number in enumerate(unique[alike].tolist()) if number not in reasons]
        frozen.update({Frozen(name, reason): None for reason in stuck[:1] if reason})
        if not free or not any(isinstance(tensors[place.parameter], nn.Parameter) for place in members):
            continue
        taken[name] += 1
        label = name if taken[name] == 1 else f"{name}#{taken[name]}"
        members = {place: rows_[free] for place, rows_ in members.items()}
        families.append(Family(label, _kind(members, tensors, model), _sorted(members)))
    return families, list(frozen)


def _alike(place_of: Array, first: Array, count: int) -> list[list[int]]:
    """Positions of classes that touch the same places equally often; found by random sums, in order of places."""
    weights = np.random.default_rng(0).integers(1, 2**62, count, dtype=np.uint64)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, key in enumerate(np.add.reduceat(weights[place_of], first).tolist()):
        groups[key].append(position)
    return sorted(groups.values(), key=lambda positions: int(place_of[first[positions]].min()))


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
    if any(
        isinstance(module, nn.RNNBase | nn.RNNCellBase) and place.parameter.split(".")[-1].startswith("weight_hh")
        for place, module in zip(members, modules, strict=True)
    ):
        return "hidden"
    if any(isinstance(module, nn.Embedding) for module in modules):
        return "width"
    matrices = [place for place in members if tensors[place.parameter].ndim == 2]
    producers = [place for place in matrices if place.dim == 0]
    if (
        len(producers) > 1
        and any(isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__ for module in modules)
        and len(producers) > 2
    ):
        return "width"
    if producers and all(members[place].shape[1] > 1 for place in matrices) and len(matrices) > 1:
        return "head"
    return "channel"
