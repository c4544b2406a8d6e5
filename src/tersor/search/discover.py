"""Finds out what can be decided about a model: blocks that may go, families that may shrink, weights that compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.task import Task
from tersor.errors import CoverageError
from tersor.graph import Family
from tersor.graph.blocks import find_blocks
from tersor.graph.coupling import runs_of
from tersor.measure import mac_counts
from tersor.prune import choose_units
from tersor.prune.steps import examples
from tersor.search.space import Group, Sizes, Space, Weight

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)  # of a family that may stay
STEPS = (16, 8, 4, 2, 1)  # multiples that integer kernels like, the largest that leaves a choice
LEAST_OPTIONS = 4  # multiples of the step that a family must have for the step to be taken


def discover(
    model: nn.Module, task: Task, *, formats: Sequence[str] = ("float32",), kinds: Sequence[str] | None = None
) -> Space:
    """The search space of a model.

    Families are verified one by one against the masked model, so what is offered can be cut.

    Args:
        model: In evaluation mode; it stays as it is.
        task: For example inputs.
        formats: Number formats that may be chosen.
        kinds: Kinds of groups that are offered (`block`, `channel`, `head`, `hidden`, `width`); all by default.

    Raises:
        ModelError: if the model does not run on the examples.
    """
    runs = runs_of(examples(task))
    blocks, unskippable = find_blocks(model, runs)
    frozen = [f"{item.name}: {item.reason}" for item in unskippable]
    families: list[Family] = []
    try:
        chosen = choose_units(model, examples(task), criterion="l1", amount=0.5, floor=0.0)
        families = [family for family in chosen.coupling.families if family.name in chosen.families]
        frozen += [f"{item.name}: {item.reason}" for item in chosen.frozen]
    except CoverageError as error:
        frozen.append(str(error))
    offered = [group for group in _groups([block.path for block in blocks], families) if len(group.options) > 1]
    if kinds is not None:
        offered = [group for group in offered if group.kind in kinds]
    named = {group.name for group in offered}
    weights = _weights(
        model,
        task.example(1),
        [block.path for block in blocks if block.path in named],
        [family for family in families if family.name in named],
    )
    return Space(tuple(offered), tuple(weights), tuple(formats), tuple(frozen))


def widths_of(size: int, kind: str) -> tuple[int, ...]:
    """Numbers of units that may stay of `size`, the largest first: whole heads, multiples that kernels like."""
    step = 1 if kind == "head" else next(step for step in STEPS if size >= LEAST_OPTIONS * step or step == 1)
    kept = {max(step, round(share * size / step) * step) for share in SHARES[1:]}
    return (size, *sorted((value for value in kept if value < size), reverse=True))


def _groups(blocks: Sequence[str], families: Sequence[Family]) -> list[Group]:
    groups = [Group(path, "block", (1, 0)) for path in blocks]
    for family in families:
        paths = [place.parameter for place in family.members]
        inside = next((block for block in blocks if all(path.startswith(f"{block}.") for path in paths)), None)
        groups.append(Group(family.name, family.kind, widths_of(family.size, family.kind), inside))
    return groups


def _weights(model: nn.Module, batch: Batch, blocks: Sequence[str], families: Sequence[Family]) -> list[Weight]:
    macs, outputs = mac_counts(model, batch), _outputs(model, batch)
    found: list[Weight] = []
    seen: set[int] = set()
    for owner, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim >= 2 and id(parameter) not in seen
        }
        seen |= {id(parameter) for parameter in own.values()}
        total = sum(parameter.numel() for parameter in own.values())
        for name, parameter in own.items():
            path = f"{owner}.{name}".lstrip(".")
            share = parameter.numel() / total
            work = round(macs.get(owner, 0) * share)
            answers = round(outputs.get(owner, 0) * share)
            found.append(
                Weight(
                    path=path,
                    kind=f"{type(module).__name__} {tuple(parameter.shape)} {work}",
                    macs=work,
                    outputs=answers,
                    entries=parameter.numel(),
                    block=next((block for block in blocks if path.startswith(f"{block}.")), None),
                    rows=_sizes(path, 0, parameter, families),
                    columns=_sizes(path, 1, parameter, families),
                )
            )
    return found


def _sizes(path: str, dim: int, parameter: Tensor, families: Sequence[Family]) -> Sizes:
    """Families that own entries along a dimension, with the share that each owns."""
    found = []
    for family in families:
        for place, entries in family.members.items():
            if place.parameter == path and place.dim == dim:
                found.append((family.name, entries.numel() / parameter.shape[dim]))
    return tuple(found)


def _outputs(model: nn.Module, batch: Batch) -> Mapping[str, int]:
    """Elements that modules with weights answer with, by path."""
    counts: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, __: Any, answer: Any) -> None:
            first = answer[0] if isinstance(answer, tuple) and answer else answer
            if isinstance(first, Tensor):
                counts[path] = counts.get(path, 0) + first.numel()

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        with torch.no_grad():
            batch.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return counts
