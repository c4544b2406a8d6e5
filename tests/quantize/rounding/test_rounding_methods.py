"""What holds for every method that looks at data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_problems import AFFINE, METHODS, SYMMETRIC, gram_of, inputs
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import output_error
from tersor.quantize.rounding import WeightGrid, adaround
from zoo import normal

every_method = pytest.mark.parametrize("name", sorted(METHODS))
QUICK = {**METHODS, "adaround": lambda weight, x, grid: adaround(weight, x, grid, steps=15, batch=8)}


def assert_on_grid(values: Tensor, grid: WeightGrid) -> None:
    scale, zero_point = (part.double() for part in grid.expanded(values.shape[1]))
    codes = values.double() / scale + zero_point
    assert float((codes - codes.round()).abs().max()) < 0.01  # of 16 bits, float32 keeps no more
    assert grid.scheme.qmin - 0.01 < float(codes.min()) <= float(codes.max()) < grid.scheme.qmax + 0.01


def assert_not_worse(weight: Tensor, values: Tensor, grid: WeightGrid, x: Tensor) -> None:
    gram = gram_of(x.double())
    nearest = output_error(weight, grid.nearest(weight), gram)
    assert output_error(weight, values, gram) <= nearest * (1 + 1e-4)


@every_method
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 4),
    groups=st.integers(1, 5),
    samples=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    form=st.sampled_from([(True, True), (True, False), (False, False)]),
    power=st.sampled_from([(0, 0), (-60, 0), (60, 0), (0, -30), (0, 30), (-30, 30)]),
    dead=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_lie_on_the_grid_and_are_never_worse_than_nearest(
    name: str,
    rows: int,
    size: int,
    groups: int,
    samples: int,
    bits: int,
    form: tuple[bool, bool],
    power: tuple[int, int],
    dead: bool,
    double: bool,
    seed: int,
) -> None:
    """One row, one column, a group per column, fewer samples than columns, dead inputs, any magnitude."""
    columns = size * groups
    weight = normal(rows, columns, seed=seed) * 2.0 ** power[0]
    x = inputs(columns, samples, seed) * 2.0 ** power[1]
    if dead:
        x[:, columns // 2] = 0
    if double:
        weight, x = weight.double(), x.double()
    grid = WeightGrid.fitted(weight, QuantScheme(bits=bits, signed=form[0], symmetric=form[1]), groups)
    before = weight.clone(), x.clone()
    found = QUICK[name](weight, x, grid)
    assert found.shape == weight.shape
    assert found.dtype == weight.dtype
    assert_on_grid(found, grid)
    assert_not_worse(weight, found, grid, x)
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])
    assert torch.equal(QUICK[name](weight, x, grid), found)


@every_method
@pytest.mark.parametrize("power", [(80, 55), (-80, -50)])
def test_the_size_of_weights_and_inputs_does_not_matter(name: str, power: tuple[int, int]) -> None:
    """Though squares and products of such numbers are out of reach of float32."""
    weight, x = normal(6, 12), inputs(12, 60)
    grid = WeightGrid.fitted(weight, AFFINE, 3)
    moved = WeightGrid(AFFINE, grid.scale * 2.0 ** power[0], grid.zero_point)
    found = METHODS[name](weight * 2.0 ** power[0], x * 2.0 ** power[1], moved)
    assert torch.equal(found, METHODS[name](weight, x, grid) * 2.0 ** power[0])


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE])
def test_narrow_types_come_back_as_they_went_in(name: str, dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight, x = normal(6, 12).to(dtype), inputs(12, 60)
    grid = WeightGrid.fitted(weight, scheme, 3)
    found = METHODS[name](weight, x, grid)
    assert found.dtype == dtype
    assert torch.equal(grid.nearest(found), found)
    assert not torch.equal(found, grid.nearest(weight))
    assert_not_worse(weight, found, grid, x)


@every_method
def test_a_grid_finer_than_the_weight_can_be_used(name: str) -> None:
    weight, x = normal(6, 12), inputs(12, 60)
    grid = WeightGrid.fitted(weight.double(), SYMMETRIC)
    assert_on_grid(METHODS[name](weight, x, grid), grid)


@every_method
def test_weights_of_zero_stay_zero(name: str) -> None:
    weight, x = normal(4, 8), inputs(8, 40)
    weight[1] = 0
    weight[2, 4:] = 0  # a whole group, which must not take up what others lose
    found = METHODS[name](weight, x, WeightGrid.fitted(weight, SYMMETRIC, 2))
    assert float(found[1].abs().max()) == 0
    assert float(found[2, 4:].abs().max()) < 1e-30
    assert not bool(METHODS[name](torch.zeros(3, 8), x, WeightGrid.fitted(torch.zeros(3, 8), AFFINE)).any())


@every_method
def test_inputs_of_zero_leave_the_nearest(name: str) -> None:
    weight = normal(4, 8)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    assert torch.equal(METHODS[name](weight, torch.zeros(20, 8), grid), grid.nearest(weight))


@every_method
def test_what_is_on_the_grid_stays(name: str) -> None:
    grid = WeightGrid.fitted(normal(4, 8), AFFINE, 2)
    weight = grid.nearest(normal(4, 8))
    assert torch.equal(METHODS[name](weight, inputs(8, 40), grid), weight)


@every_method
def test_dead_inputs_cost_the_others_nothing(name: str) -> None:
    weight, x = normal(5, 9), inputs(9, 60)
    x[:, 4] = 0
    grid = WeightGrid.fitted(weight, SYMMETRIC, 9)
    live = [column for column in range(9) if column != 4]
    without = WeightGrid(SYMMETRIC, grid.scale[:, live], grid.zero_point[:, live])
    found = METHODS[name](weight, x, grid)
    one, other = (
        output_error(weight[:, live], values, gram_of(x[:, live]))
        for values in (found[:, live], METHODS[name](weight[:, live], x[:, live], without))
    )
    assert one <= 1.15 * other  # λ and λ's share differ a little


@every_method
def test_gradients_do_not_flow(name: str) -> None:
    weight = normal(4, 8).requires_grad_()
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    found = METHODS[name](weight, inputs(8, 40), grid)
    assert not found.requires_grad
    assert weight.grad is None


@every_method
def test_what_does_not_fit_is_refused(name: str) -> None:
    weight, x = normal(4, 8), inputs(8, 40)
    grid = WeightGrid.fitted(weight, SYMMETRIC, 4)
    for wrong, seen in (
        (weight[:3], x),
        (weight[:, :6], x[:, :6]),
        (weight, x[:, :7]),
        (weight.reshape(4, 2, 4), x),
        (weight[:, :0], x[:, :0]),
    ):
        with pytest.raises(ConfigError, match=r"expected|grid"):
            METHODS[name](wrong, seen, grid)


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_refused(name: str, bad: float) -> None:
    weight, x = normal(4, 8), inputs(8, 40)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(NonFiniteError, match="weight"):
        METHODS[name](broken, x, grid)
    broken = x.clone()
    broken[1, 2] = bad
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        METHODS[name](weight, broken, grid)
