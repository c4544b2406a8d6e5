from __future__ import annotations

import itertools

import pytest
import torch
from rounding_problems import AFFINE, SYMMETRIC, gram_of, inputs, textbook
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.probe.hessian import output_error
from tersor.quantize import ranges
from tersor.quantize.rounding import WeightGrid, obq
from zoo import normal


def greedy(errors: Tensor, pivots: Tensor, steps: Tensor) -> int:
    """Off the grid first, the costliest of them; otherwise the cheapest."""
    costs, outliers = errors.square() / pivots, errors.abs() > 0.501 * steps
    return int(costs.where(outliers, -1).argmax() if bool(outliers.any()) else costs.argmin())


@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE, QuantScheme(bits=2, signed=True, symmetric=True)])
@pytest.mark.parametrize("groups", [1, 4])
def test_it_takes_the_same_steps_as_the_textbook(scheme: QuantScheme, groups: int) -> None:
    weight, gram = normal(12, 16).double(), gram_of(inputs(16, 80).double())
    grid = WeightGrid.fitted(weight, scheme, groups, method=ranges.mse)  # saturates, so there are outliers
    found, expected = obq(weight, gram, grid), textbook(weight, gram, grid, greedy)
    same = (found - expected).abs().amax(1) < 1e-9
    assert int(same.sum()) >= 8  # the rest is better off with the nearest
    assert torch.equal(found[~same], grid.nearest(weight)[~same])


def test_it_is_near_the_best_of_all() -> None:
    scheme = QuantScheme(bits=2, signed=True, symmetric=True)
    codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=4))).double()
    ratios = []
    for seed in range(20):
        weight, gram = normal(1, 4, seed=seed).double(), gram_of(inputs(4, 40, seed).double())
        grid = WeightGrid.fitted(weight, scheme)
        change = codes * grid.scale - weight
        least = float(((change @ gram) * change).sum(1).min())
        found = output_error(weight, obq(weight, gram, grid), gram)
        assert found >= least * (1 - 1e-9)
        ratios.append(found / least)
    assert sorted(ratios)[10] < 1.05
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_outputs_err_much_less_than_with_the_nearest(bits: int) -> None:
    scheme = QuantScheme(bits=bits, signed=True, symmetric=True)
    for seed in range(3):
        weight, gram = normal(24, 32, seed=seed), gram_of(inputs(32, 128, seed))
        grid = WeightGrid.fitted(weight, scheme, 4)
        nearest = output_error(weight, grid.nearest(weight), gram)
        assert output_error(weight, obq(weight, gram, grid), gram) < 0.7 * nearest


def test_it_does_not_depend_on_how_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(13, 12).double(), gram_of(inputs(12, 60).double())
    grid = WeightGrid.fitted(weight, AFFINE, 3)
    expected = obq(weight, gram, grid)
    for rows in (1, 5):
        monkeypatch.setitem(obq.__globals__, "CHUNK", rows * 144)
        assert torch.allclose(obq(weight, gram, grid), expected, rtol=1e-12)


def test_weights_off_the_grid_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, errors = QuantScheme(bits=2, signed=True, symmetric=True), {}
    for limit in (0.501, float("inf")):
        monkeypatch.setitem(obq.__globals__, "OUTLIER", limit)
        errors[limit] = 0.0
        for seed in range(6):
            weight, gram = normal(24, 32, seed=seed), gram_of(inputs(32, 128, seed))
            grid = WeightGrid.fitted(weight, scheme, method=ranges.mse)  # some saturate
            errors[limit] += output_error(weight, obq(weight, gram, grid), gram)
    assert errors[0.501] < 0.8 * errors[float("inf")]


def test_where_columns_have_nothing_in_common_it_is_the_nearest() -> None:
    weight = normal(5, 8)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    assert torch.equal(obq(weight, torch.diag(torch.arange(1.0, 9.0)), grid), grid.nearest(weight))
    assert torch.equal(obq(weight, gram_of(inputs(8, 40)), grid, damping=1e6), grid.nearest(weight))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_few_directions_leave_much_to_repair_with(damping: float) -> None:
    """Inputs in two directions only: the Gram matrix is singular."""
    for seed in range(3):
        weight, gram = normal(16, 24, seed=seed), gram_of(inputs(2, 64, seed) @ normal(2, 24, seed=seed))
        grid = WeightGrid.fitted(weight, SYMMETRIC)
        nearest = output_error(weight, grid.nearest(weight), gram)
        assert output_error(weight, obq(weight, gram, grid, damping=damping), gram) < 0.4 * nearest
