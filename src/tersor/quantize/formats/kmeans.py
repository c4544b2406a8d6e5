"""k-means of numbers: each region's entries in at most `K` clusters. All regions at once, deterministic.

Shapes: `R` regions, `N` entries of a region, `K` clusters, `A` atoms of the exact solution. Since numbers can be
sorted, a cluster is an interval, and sums over it are differences of running sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Initial = Literal["linear", "quantile", "optimal"]
ROUNDS = 100
ATOMS = 512
AT_ONCE = 1 << 18  # numbers of the exact solution that are worked on together


@dataclass(frozen=True)
class Sorted:
    """Values `[R, N]` in ascending order, with running sums `[R, N + 1]` of their weights and of weight times value."""

    values: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Sorted:
        """Sorts."""
        values, order = values.sort(dim=1, stable=True)
        weights = weights.gather(1, order)
        running = [functional.pad(part.cumsum(1), (1, 0)) for part in (weights, weights * values)]
        return cls(values, running[0], running[1])

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """Weighted mean between each two of the `edges`, `[R, K + 1]`; `otherwise`, `[R, K]`, where nothing weighs."""
        mass, moment = (running.gather(1, edges).diff(dim=1) for running in (self.mass, self.moment))
        first = self.values.gather(1, edges[:, :-1].clamp(max=self.values.shape[1] - 1))
        last = self.values.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        mean = (moment / mass).clamp(first, last)  # differences of sums are not exact
        return torch.where((mass > 0) & (edges.diff(dim=1) > 0), mean, otherwise)


def kmeans(rows: Tensor, weights: Tensor, count: int, *, initial: Initial, keep_zero: bool) -> Tensor:
    """Centroids that Lloyd's rounds end with: ``min Σ weight · (value − nearest centroid)²``.

    Args:
        rows: `[R, N]`, N > 0, float64.
        weights: `[R, N]`, not negative.
        count: `K`.
        initial: Where the rounds start: evenly over the range, at quantiles of equal weight, or at the optimum
            (dynamic programming; exact up to 512 entries, beyond on 512 means of neighbours).
        keep_zero: One centroid is 0 and stays it.

    Returns:
        `[R, K]`, ascending. Clusters that nothing is in keep their place.
    """
    # A power of two: dividing is exact, and sums neither overflow nor vanish.
    unit = torch.ldexp(torch.ones_like(rows[:, :1]), torch.frexp(rows.abs().amax(1, keepdim=True)).exponent - 1)
    found = Sorted.of(rows / unit, weights)
    centroids = {"linear": _linear, "quantile": _quantile, "optimal": _optimal}[initial](found, count)
    if keep_zero:
        centroids = centroids.scatter(1, centroids.abs().argmin(1, keepdim=True), 0.0).sort(dim=1).values
    pinned = centroids.abs().argmin(1, keepdim=True)
    edges = None
    for _ in range(ROUNDS):
        if keep_zero:
            centroids = centroids.scatter(1, pinned, 0.0)
        middle = (centroids[:, :-1] + centroids[:, 1:]) / 2
        inner = torch.searchsorted(found.values, middle, right=True)
        if edges is not None and torch.equal(inner, edges):
            break
        edges = inner
        centroids = found.means(functional.pad(functional.pad(inner, (1, 0)), (0, 1), value=rows.shape[1]), centroids)
    return (centroids.scatter(1, pinned, 0.0) if keep_zero else centroids) * unit


def _linear(found: Sorted, count: int) -> Tensor:
    low, high = found.values[:, :1], found.values[:, -1:]
    return low + (high - low) * torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)


def _quantile(found: Sorted, count: int) -> Tensor:
    share = (torch.arange(count, dtype=found.mass.dtype, device=found.mass.device) + 0.5) / count
    place = torch.searchsorted(found.mass[:, 1:].contiguous(), found.mass[:, -1:] * share)
    return found.values.gather(1, place.clamp(max=found.values.shape[1] - 1))


def _optimal(found: Sorted, count: int) -> Tensor:
    """The best of every prefix in every number of clusters. Wang and Song 2011, https://doi.org/10.32614/RJ-2011-015."""
    regions, entries = found.values.shape
    ends = torch.arange(entries + 1, device=found.values.device).expand(regions, -1)
    if (
        entries > ATOMS
    ):  # neighbours become one: half of the borders evenly by number, half by value, so that tails count
        even = torch.linspace(0, entries, ATOMS // 2 + 1, device=ends.device).round().long().expand(regions, -1)
        wide = torch.searchsorted(found.values, _linear(found, ATOMS // 2 + 1)[:, 1:-1].contiguous())
        ends = torch.cat([even, wide], dim=1).sort(dim=1).values
    atoms = ends.shape[1] - 1
    starts = found.values.gather(1, ends[:, :-1].clamp(max=entries - 1))
    means, mass = found.means(ends, starts), found.mass.gather(1, ends).diff(dim=1)
    at_once = max(1, AT_ONCE // (atoms + 1) ** 2)
    parts = zip(torch.split(means, at_once), torch.split(mass, at_once), strict=True)
    places = torch.cat([_cuts(values, weights, count) for values, weights in parts])
    return Sorted.of(means, mass).means(places, means.gather(1, places[:, :-1].clamp(max=atoms - 1)))


def _cuts(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Edges `[R, K + 1]` of the best intervals of ascending values `[R, A]`."""
    values = values - values.mean(1, keepdim=True)  # else squares would cancel
    mass, first, second = (functional.pad((weights * values**power).cumsum(1), (1, 0)) for power in range(3))
    between = [part[:, :, None] - part[:, None, :] for part in (mass, first, second)]  # [end, start]
    cost = between[2] - torch.where(between[0] > 0, between[1].square() / between[0], 0.0)
    cost = cost.clamp(min=0).masked_fill(torch.ones_like(cost[0]).triu(1) > 0, torch.inf)
    least, sums = [cost[:, :, 0]], torch.empty_like(cost)  # one buffer: fresh memory costs more than the sums
    for _ in range(count - 1):
        least.append(torch.add(least[-1][:, None, :], cost, out=sums).amin(2))
    edges = [torch.full_like(mass[:, :1], values.shape[1], dtype=torch.long)]
    for before in reversed(least[:-1]):
        last = cost.take_along_dim(edges[-1][:, :, None], 1)[:, 0]  # the last interval, by where it starts
        edges.append((before + last).argmin(1, keepdim=True))
    return torch.cat([torch.zeros_like(edges[0]), *reversed(edges)], dim=1)
