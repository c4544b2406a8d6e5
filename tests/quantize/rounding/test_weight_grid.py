from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_problems import AFFINE, SYMMETRIC

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.quantize import Granularity, ranges, uniform
from tersor.quantize.rounding import WeightGrid
from zoo import normal


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 5),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    form=st.sampled_from([(True, True), (True, False), (False, False)]),
    power=st.integers(-100, 100),
    seed=st.integers(0, 1000),
)
def test_it_rounds_like_the_uniform_format(
    rows: int, size: int, groups: int, bits: int, form: tuple[bool, bool], power: int, seed: int
) -> None:
    weight = normal(rows, size * groups, seed=seed) * 2.0**power
    grid = WeightGrid.fitted(weight, QuantScheme(bits=bits, signed=form[0], symmetric=form[1]), groups)
    expected = uniform(weight, bits, signed=form[0], symmetric=form[1], granularity=Granularity.group(size))
    assert grid.scale.shape == grid.zero_point.shape == (rows, groups)
    assert torch.equal(grid.scale, expected.scale.reshape(rows, groups))  # type: ignore[union-attr]
    assert torch.equal(grid.codes(weight), expected.codes.long())
    assert torch.equal(grid.nearest(weight), expected.dequantize())
    assert torch.equal(grid.values(grid.codes(weight)), grid.nearest(weight))
    assert torch.equal(grid.nearest(grid.nearest(weight)), grid.nearest(weight))


def test_a_group_is_neighbouring_columns() -> None:
    grid = WeightGrid(SYMMETRIC, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2))
    scale, zero_point = grid.expanded(6)
    assert scale.tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert zero_point.shape == (2, 6)
    assert grid.columns(torch.tensor([5, 0, 3]), 6)[0].tolist() == [[2, 1, 2], [4, 3, 4]]


def test_symmetric_scales_are_the_largest_magnitude() -> None:
    weight = torch.tensor([[-3.0, 1.5, 0.0], [0.25, -0.5, 1.0]])
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    assert grid.scale[:, 0].tolist() == [1.0, pytest.approx(1 / 3)]
    assert grid.codes(weight)[0].tolist() == [-3, 2, 0]  # 1.5: halves go to the even code
    assert grid.codes(10 * weight)[0].tolist() == [-4, 3, 0]


def test_errors_that_matter_are_kept_small() -> None:
    weight = normal(4, 32)
    weight[:, 0] = 20  # an outlier that stretches the range
    importance = torch.ones(32)
    importance[0] = 0
    errors = {}
    for name, costs in (("all alike", None), ("not the outlier", importance), ("full", importance.expand(4, 32))):
        grid = WeightGrid.fitted(weight, SYMMETRIC, method=ranges.mse, importance=costs)
        errors[name] = float((grid.nearest(weight) - weight)[:, 1:].square().sum())
    assert errors["not the outlier"] < 0.2 * errors["all alike"]
    assert errors["full"] == errors["not the outlier"]


def test_importance_must_fit() -> None:
    weight = normal(4, 6)
    for wrong in (torch.ones(4), torch.ones(6, 4), torch.ones(1, 6), -torch.ones(6)):
        with pytest.raises(ConfigError, match="importance"):
            WeightGrid.fitted(weight, SYMMETRIC, method=ranges.mse, importance=wrong)
    with pytest.raises(NonFiniteError, match="importance"):
        WeightGrid.fitted(weight, SYMMETRIC, importance=torch.full((6,), torch.nan))


@pytest.mark.parametrize("groups", [0, -1, 4, 7])
def test_groups_must_divide_the_columns(groups: int) -> None:
    with pytest.raises(ConfigError, match="groups"):
        WeightGrid.fitted(normal(4, 6), SYMMETRIC, groups)


def test_weights_that_have_no_grid_are_refused() -> None:
    for wrong in (normal(4), normal(4, 2, 3, 3), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ConfigError, match="O, K"):
            WeightGrid.fitted(wrong, SYMMETRIC)
    with pytest.raises(ConfigError, match="float16"):
        WeightGrid.fitted(torch.ones(2, 2, dtype=torch.int64), SYMMETRIC)
    with pytest.raises(ConfigError, match="negative"):
        WeightGrid.fitted(normal(4, 6), QuantScheme(symmetric=True))
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(NonFiniteError, match=r"\(1, 0\)"):
            WeightGrid.fitted(torch.tensor([[1.0], [bad]]), SYMMETRIC)


def test_grids_that_are_none_are_refused() -> None:
    one, zero = torch.ones(2, 3), torch.zeros(2, 3)
    for scheme, scale, zero_point in (
        (AFFINE, one, zero[:1]),
        (AFFINE, one[0], zero[0]),
        (AFFINE, one[:0], zero[:0]),
        (AFFINE, zero, zero),
        (AFFINE, -one, zero),
        (AFFINE, one, one / 2),
        (AFFINE, one, 8 * one),
        (AFFINE, one, -one),
        (SYMMETRIC, one, one),
    ):
        with pytest.raises(ConfigError, match=r"expected|must be"):
            WeightGrid(scheme, scale, zero_point)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError):
            WeightGrid(AFFINE, one * bad, zero)
        with pytest.raises(NonFiniteError):
            WeightGrid(AFFINE, one, zero * torch.nan)


def test_weights_of_another_shape_are_refused() -> None:
    grid = WeightGrid.fitted(normal(4, 6), SYMMETRIC, 3)
    for wrong in (normal(3, 6), normal(4, 7), normal(4, 6, 1)):
        for method in (grid.codes, grid.nearest, grid.values):
            with pytest.raises(ConfigError):
                method(wrong)
    for count in (0, 2, 7):
        with pytest.raises(ConfigError, match="multiple of 3"):
            grid.expanded(count)
    with pytest.raises(NonFiniteError):
        grid.nearest(torch.full((4, 6), torch.nan))
