"""The Pareto front of two quantities that are both better when smaller, and the area that it dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from tersor.errors import NonFiniteError

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats, along the front: the first quantity rises, the second falls.

    A point is beaten by one that is nowhere worse and somewhere better. Of equal points the first stays.

    Args:
        points: Both quantities of each candidate, smaller is better.

    Raises:
        NonFiniteError: for NaN or infinite quantities.
    """
    _finite(points)
    best, found = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: (*points[index], index)):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area between the front and a reference point; larger is better. A point beyond the reference adds nothing.

    A = area of the union over points p of [p₁, r₁] x [p₂, r₂]. Zitzler & Thiele 1999,
    https://doi.org/10.1109/4235.797969. Two fronts compare only under the same reference.

    Args:
        points: Both quantities of each candidate, smaller is better.
        reference: What is just not acceptable any more, such as the largest drop and the uncompressed model's latency.

    Raises:
        NonFiniteError: for NaN or infinite quantities.
    """
    _finite([*points, reference])
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    stairs = [inside[index] for index in front(inside)]
    steps = pairwise([*stairs, reference])
    return sum((end - first) * (reference[1] - second) for (first, second), (end, _) in steps)


def _finite(points: Sequence[Point]) -> None:
    for index, point in enumerate(points):
        if not all(math.isfinite(value) for value in point):
            raise NonFiniteError(f"points[{index}]: expected two finite numbers, got {point}: leave out failed trials")
