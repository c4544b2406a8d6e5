"""The front is what no point beats; the area under it is the area of the union of rectangles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import NonFiniteError
from tersor.search.front import front, hypervolume

GRID = st.integers(min_value=0, max_value=6)
POINTS = st.lists(st.tuples(GRID, GRID), max_size=12)
REFERENCE = (5, 6)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def cells(points: list[tuple[int, int]]) -> int:
    """Unit squares that some point dominates, counted one by one."""
    return sum(
        any(first <= x and second <= y for first, second in points)
        for x in range(REFERENCE[0])
        for y in range(REFERENCE[1])
    )


@given(POINTS)
def test_the_front_is_what_no_point_beats_and_of_equal_points_the_first(points: list[tuple[int, int]]) -> None:
    expected = {
        index
        for index, point in enumerate(points)
        if not any(beats(other, point) for other in points) and point not in points[:index]
    }
    found = front(points)
    assert set(found) == expected
    assert len(found) == len(expected)


@given(POINTS)
def test_along_the_front_one_rises_and_the_other_falls(points: list[tuple[int, int]]) -> None:
    stairs = [points[index] for index in front(points)]
    assert all(one[0] < next_[0] and one[1] > next_[1] for one, next_ in pairwise(stairs))


@given(POINTS)
def test_the_area_is_that_of_the_union(points: list[tuple[int, int]]) -> None:
    assert hypervolume(points, REFERENCE) == cells(points)


@given(POINTS, st.tuples(GRID, GRID), st.randoms(use_true_random=False))
def test_the_area_never_falls_and_knows_no_order(points: list[tuple[int, int]], more: tuple[int, int], random) -> None:
    area = hypervolume(points, REFERENCE)
    assert hypervolume([*points, more], REFERENCE) >= area
    assert (hypervolume([*points, more], REFERENCE) > area) == (cells([*points, more]) > cells(points))
    random.shuffle(points)
    assert hypervolume(points, REFERENCE) == area


def test_a_worked_example() -> None:
    points = [(3.0, 0.01), (2.0, 0.03), (3.0, 0.02), (2.0, 0.03), (9.0, -0.01)]
    assert front(points) == [1, 0, 4]
    assert hypervolume(points, (6.0, 0.05)) == pytest.approx(1 * 0.02 + 3 * 0.04)
    assert front([]) == []
    assert hypervolume([], (1.0, 1.0)) == 0
    assert hypervolume([(1.0, 0.0)], (1.0, 1.0)) == 0  # on the edge


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_numbers_that_compare_with_nothing_are_refused(odd: float) -> None:
    with pytest.raises(NonFiniteError, match=r"points\[1\]"):
        front([(1.0, 1.0), (1.0, odd)])
    with pytest.raises(NonFiniteError, match=r"points\[1\]"):
        hypervolume([(1.0, 1.0)], (odd, 1.0))
