"""How much each layer loses: shares from names, sizes, shapes or scores; nothing here knows what a layer is.

All return `name -> share removed`, and ``round(share · n)`` is the number of units that go. A `floor` is the share of
every group that stays at least; one unit always does, so that no group dies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from tersor.errors import ConfigError

HALVINGS = 200  # of a bisection over floats: more than their digits


def spare(size: int, floor: float) -> int:
    """How many of `size` units may go at most."""
    return size - max(1, math.ceil(floor * size - 1e-9)) if size else 0


def uniform(sizes: Mapping[str, int], amount: float, floor: float = 0.0) -> dict[str, float]:
    """The same share of every group.

    Args:
        sizes: Units of each group.
        amount: Share removed, in [0, 1).
        floor: Share that stays at least.
    """
    _check(amount, floor)
    return {name: _share(amount, size, floor) for name, size in sizes.items()}


def per_layer(
    sizes: Mapping[str, int], amounts: Mapping[str, float], *, default: float = 0.0, floor: float = 0.0
) -> dict[str, float]:
    """An amount for each glob pattern of names; of several that fit, the last counts.

    Args:
        sizes: Units of each group.
        amounts: Glob pattern (`layer4.*`) -> share removed.
        default: What groups lose that no pattern names.
        floor: Share that stays at least.

    Raises:
        ConfigError: for a pattern that names nothing, or an amount out of range.
    """
    for pattern, amount in amounts.items():
        _check(amount, floor)
        if not any(fnmatchcase(name, pattern) for name in sizes):
            raise ConfigError(f"allocation: {pattern!r} names no layer; there are {list(sizes)[:8]} …")
    _check(default, floor)
    found = {}
    for name, size in sizes.items():
        fitting = [amount for pattern, amount in amounts.items() if fnmatchcase(name, pattern)]
        found[name] = _share(fitting[-1] if fitting else default, size, floor)
    return found


def global_ranking(scores: Mapping[str, Tensor], amount: float, floor: float = 0.0) -> dict[str, float]:
    """Ranks all units together; the lowest go, whichever group they are in.

    Args:
        scores: One per unit, any shape; ``−∞`` marks what went before: it goes again and counts.
        amount: Share of all units removed, in [0, 1); less where floors forbid, more where more went before.
        floor: Share of every group that stays: its highest scores.
    """
    _check(amount, floor)
    if not scores:
        return {}
    ranked = []
    for values in scores.values():
        flat = values.detach().flatten().float().clone()
        gone = flat == -torch.inf
        safe = flat.topk(flat.numel() - spare(flat.numel(), floor)).indices
        flat[safe] = torch.inf
        ranked.append(flat.masked_fill(gone, -torch.inf))
    everything = torch.cat(ranked)
    before, free = int((everything == -torch.inf).sum()), int((everything < torch.inf).sum())
    removed = max(before, min(round(amount * everything.numel()), free))
    mask = torch.zeros(everything.numel(), dtype=torch.bool, device=everything.device)
    mask[everything.argsort(stable=True)[:removed]] = True
    parts = torch.split(mask, [part.numel() for part in ranked])
    return {name: int(part.sum()) / max(1, part.numel()) for name, part in zip(scores, parts, strict=True)}


def below(scores: Mapping[str, Tensor], threshold: float, floor: float = 0.0) -> dict[str, float]:
    """What scores less than `threshold` goes, as far as floors allow."""
    _check(0.0, floor)
    return {
        name: min(int((values < threshold).sum()), spare(values.numel(), floor)) / max(1, values.numel())
        for name, values in scores.items()
    }


def erk(shapes: Mapping[str, Sequence[int]], amount: float, floor: float = 0.0) -> dict[str, float]:
    """Erdős-Rényi-Kernel: large layers lose more. Evci et al. 2019, https://arxiv.org/abs/1911.11134.

    The share kept of a layer of shape ``[n_out, n_in, k₁, …]`` is ``ε · (n_out + n_in + Σ k) / (n_out · n_in · Π k)``,
    between `floor` and 1, with the one ε at which the share `amount` of all weights goes.

    Args:
        shapes: Shape of each weight.
        amount: Share of all weights removed, in [0, 1); less where floors forbid.
        floor: Share of every weight that stays at least.
    """
    _check(amount, floor)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / max(1, sizes[name]) for name, shape in shapes.items()}
    wanted = (1 - amount) * sum(sizes.values())

    def kept(scale: float) -> float:
        return sum(min(1.0, max(floor, scale * raw[name])) * size for name, size in sizes.items())

    low, high = 0.0, max((1 / value for value in raw.values() if value), default=0.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) >= wanted else (middle, high)
    return {name: _share(max(0.0, 1 - high * raw[name]), size, floor) for name, size in sizes.items()}


class Reached(NamedTuple):
    """Attributes: `amount` and its `cost`; `reached` is False where no amount was cheap enough (then the cheapest)."""

    amount: float
    cost: float
    reached: bool


def reach(
    target: float,
    cost: Callable[[float], float],
    *,
    low: float = 0.0,
    high: float = 0.99,
    tolerance: float = 1e-3,
) -> Reached:
    """The least amount whose cost is at most `target`, by bisection.

    Asks for ``2 + log₂((high − low) / tolerance)`` costs. Where `cost` is not quite monotone, the answer still is one
    that was measured to be cheap enough.

    Args:
        target: Multiply-accumulates, parameters, bytes - whatever `cost` counts.
        cost: Amount -> cost of the result; falls with the amount.
        low: Least amount that is tried.
        high: Largest amount that is tried.
        tolerance: How near the answer is to the least possible amount.
    """
    if not 0 <= low <= high <= 1 or tolerance <= 0:
        raise ConfigError(f"expected 0 <= low <= high <= 1 and tolerance > 0, got {low}, {high} and {tolerance}")
    first = cost(low)
    if first <= target:
        return Reached(low, first, True)
    best = Reached(high, cost(high), True)
    if best.cost > target:
        cheapest = min((first, low), (best.cost, high))
        return Reached(cheapest[1], cheapest[0], False)
    while best.amount - low > tolerance:
        middle = (low + best.amount) / 2
        if not low < middle < best.amount:
            break
        spent = cost(middle)
        if spent <= target:
            best = Reached(middle, spent, True)
        else:
            low = middle
    return best


def _share(amount: float, size: int, floor: float) -> float:
    """`amount`, or less where `floor` forbids it."""
    return min(amount, spare(size, floor) / max(1, size))


def _check(amount: float, floor: float) -> None:
    if not 0 <= amount < 1 or not 0 <= floor < 1:
        raise ConfigError(f"amount and floor must be in [0, 1), got {amount} and {floor}")
