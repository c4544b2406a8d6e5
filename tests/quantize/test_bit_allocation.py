"""The integer program against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ConfigError
from tersor.quantize import allocate
from tersor.quantize.allocation import average_of
from tersor.quantize.sensitivity import LayerSensitivity, Sensitivity

BITS = (2, 4, 8)
CLOSE = 1 + 1e-9


def layer(name: str, parameters: int, losses: Sequence[float], bits: Sequence[int] = BITS) -> LayerSensitivity:
    return LayerSensitivity(name, "Linear", parameters, 3, parameters, dict(zip(bits, losses, strict=True)))


def found(*rows: LayerSensitivity) -> Sensitivity:
    return Sensitivity(rows, BITS, "output", "KL divergence", 8, 0.0)


@st.composite
def problems(draw: Any) -> Sensitivity:
    """Up to five layers whose losses span many orders of magnitude."""
    rows = []
    for number in range(draw(st.integers(1, 5))):
        exponents = [draw(st.floats(-9, 2)) for _ in BITS]
        losses = sorted((10**exponent for exponent in exponents), reverse=True)
        rows.append(layer(f"layer{number}", draw(st.integers(1, 10 ** draw(st.integers(1, 8)))), losses))
    return found(*rows)


def everything(problem: Sensitivity) -> Iterator[dict[str, int]]:
    for widths in itertools.product(*(row.loss for row in problem.rows)):
        yield {row.layer: bits for row, bits in zip(problem.rows, widths, strict=True)}


def total(problem: Sensitivity, widths: dict[str, int], count: Callable[[LayerSensitivity, int], float]) -> float:
    return sum(count(row, widths[row.layer]) for row in problem.rows)


def loss(problem: Sensitivity, widths: dict[str, int]) -> float:
    return total(problem, widths, LayerSensitivity.loss_at)


def size(problem: Sensitivity, widths: dict[str, int]) -> float:
    return total(problem, widths, LayerSensitivity.size_bytes)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(2, 8))
def test_no_other_widths_lose_less_at_this_average(problem: Sensitivity, limit: float) -> None:
    widths = allocate(problem, average_bits=limit)
    assert average_of(problem, widths) <= limit * CLOSE
    best = min(loss(problem, w) for w in everything(problem) if average_of(problem, w) <= limit * CLOSE)
    assert loss(problem, widths) <= best * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0, 1))
def test_no_other_widths_lose_less_in_these_bytes(problem: Sensitivity, share: float) -> None:
    sizes = [size(problem, widths) for widths in everything(problem)]
    limit = min(sizes) + share * (max(sizes) - min(sizes))
    widths = allocate(problem, max_bytes=limit)
    assert size(problem, widths) <= limit * CLOSE
    best = min(loss(problem, w) for w in everything(problem) if size(problem, w) <= limit * CLOSE)
    assert loss(problem, widths) <= best * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(1, 1e4))
def test_nothing_smaller_loses_so_little(problem: Sensitivity, factor: float) -> None:
    limit = factor * min(loss(problem, widths) for widths in everything(problem))
    widths = allocate(problem, max_loss=limit)
    assert loss(problem, widths) <= limit * (1 + 1e-6)
    best = min(size(problem, w) for w in everything(problem) if loss(problem, w) <= limit * CLOSE)
    assert size(problem, widths) <= best


def test_costs_are_made_smallest_or_limited() -> None:
    problem = found(layer("a", 100, [3, 2, 1]), layer("b", 100, [30, 2, 1]))
    costs = {"a": {2: 9.0, 4: 5.0, 8: 1.0}, "b": {2: 1.0, 4: 2.0, 8: 4.0}}
    assert allocate(problem, max_loss=4, costs=costs) == {"a": 8, "b": 4}  # narrow kernels may be slower
    assert allocate(problem, max_cost=6.5, costs=costs) == {"a": 8, "b": 8}
    assert allocate(problem, max_cost=2.5, costs=costs) == {"a": 8, "b": 2}
    assert allocate(problem, max_cost=99, average_bits=4, costs=costs) == {"a": 4, "b": 4}


def test_float_is_a_choice_without_loss() -> None:
    problem = found(layer("a", 10, [9, 8, 7]), layer("b", 1000, [0.3, 0.2, 0.1]))
    assert allocate(problem, average_bits=6, choices=(4, 8, 32)) == {"a": 32, "b": 4}


def test_choices_per_layer_and_fixed_layers() -> None:
    problem = found(
        layer("a", 100, [3, 2, 1]), layer("b", 100, [3, 2, 1]), layer("table", 100, [0.5], bits=(8,))
    )  # fmt: skip
    assert allocate(problem, average_bits=99, choices=(2, 4)) == {"a": 4, "b": 4, "table": 8}
    assert allocate(problem, average_bits=99, choices={"a": [2]}) == {"a": 2, "b": 8, "table": 8}


def test_widths_that_answer_nonsense_are_never_chosen() -> None:
    problem = found(layer("a", 100, [math.inf, 2, 1]))
    assert allocate(problem, average_bits=5) == {"a": 4}
    with pytest.raises(ConfigError, match="loses infinitely much"):
        allocate(found(layer("a", 1, [math.inf] * 3)), average_bits=5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "set at least one of"),
        ({"average_bits": 1.5}, "average_bits=1.5 cannot be met with these widths, the smallest that can is 2"),
        ({"max_bytes": 10}, "max_bytes=10 .* the smallest that can is 74"),
        ({"max_loss": 0.5}, "max_loss=0.5 .* the smallest that can is 2"),
        ({"max_loss": 2, "average_bits": 2}, "max_loss=2 cannot be met together with average_bits=2; .* is 33"),
        ({"max_bytes": math.nan}, "expected finite numbers"),
        ({"max_bytes": -1}, "expected finite numbers"),
        ({"max_cost": 1}, "costs go with max_cost or max_loss"),
        ({"average_bits": 4, "costs": {}}, "costs go with max_cost or max_loss"),
        ({"max_cost": 1, "costs": {"a": {2: 1.0}}}, "costs say nothing of 'a' at 4 bits"),
        ({"average_bits": 4, "choices": (3,)}, r"'a' was measured at \[2, 4, 8\] bits, choices allow only \[3\]"),
        ({"average_bits": 4, "choices": {"z": (4,)}}, r"choices for \['z'\], which are no layers"),
    ],
)
def test_what_cannot_be_met_is_said(fields: dict[str, Any], said: str) -> None:
    problem = found(layer("a", 100, [3, 2, 1]), layer("b", 100, [30, 2, 1]))
    with pytest.raises(ConfigError, match=said):
        allocate(problem, **fields)


def test_hundreds_of_layers_take_a_moment() -> None:
    rows = [layer(f"layer{n}", 1000 + 37 * n, [0.9 / (n + 1), 0.05 / (n + 1), 1e-4]) for n in range(300)]
    widths = allocate(found(*rows), average_bits=3.3)
    assert len(widths) == 300
    assert 3.29 < average_of(found(*rows), widths) <= 3.3
