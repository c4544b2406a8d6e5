from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding_problems import AFFINE, SYMMETRIC, gram_of, inputs, textbook, unequal

from tersor.core.quantization import QuantScheme
from tersor.probe.hessian import output_error
from tersor.quantize.rounding import WeightGrid, gptq
from zoo import normal


@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE, QuantScheme(bits=8, signed=True, symmetric=True)])
@pytest.mark.parametrize("groups", [1, 4])
def test_it_takes_the_same_steps_as_the_textbook(scheme: QuantScheme, groups: int) -> None:
    weight, gram = normal(12, 16).double(), gram_of(inputs(16, 80).double())
    grid = WeightGrid.fitted(weight, scheme, groups)
    expected = textbook(weight, gram, grid, lambda errors, pivots, steps: 0)
    assert output_error(weight, expected, gram) < output_error(weight, grid.nearest(weight), gram)
    same = (gptq(weight, gram, grid, act_order=False) - expected).abs().amax(1) < 1e-9
    assert int(same.sum()) >= 8  # the rest is better off with the nearest
    assert torch.equal(gptq(weight, gram, grid, act_order=False)[~same], grid.nearest(weight)[~same])

    order = gram.diagonal().argsort(descending=True)
    fine = WeightGrid(scheme, *grid.expanded(16))
    moved = WeightGrid(scheme, fine.scale[:, order], fine.zero_point[:, order])
    expected = textbook(weight[:, order], gram[order][:, order], moved, lambda errors, pivots, steps: 0)
    same = (gptq(weight, gram, grid)[:, order] - expected).abs().amax(1) < 1e-9
    assert int(same.sum()) >= 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_outputs_err_much_less_than_with_the_nearest(bits: int, groups: int) -> None:
    scheme = QuantScheme(bits=bits, signed=True, symmetric=True)
    for seed in range(5):
        weight, gram = normal(24, 32, seed=seed), gram_of(inputs(32, 128, seed))
        grid = WeightGrid.fitted(weight, scheme, groups)
        nearest = output_error(weight, grid.nearest(weight), gram)
        assert output_error(weight, gptq(weight, gram, grid), gram) < 0.7 * nearest


def test_large_inputs_first_is_better() -> None:
    errors = []
    for seed in range(5):
        weight, gram = normal(24, 32, seed=seed), gram_of(unequal(inputs(32, 128, seed), seed))
        grid = WeightGrid.fitted(weight, SYMMETRIC)
        errors.append(
            [output_error(weight, gptq(weight, gram, grid, act_order=order), gram) for order in (True, False)]
        )
    assert all(first < plain for first, plain in errors)


def test_blocks_are_only_a_matter_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(12, 40).double(), gram_of(inputs(40, 200).double())
    grid = WeightGrid.fitted(weight, AFFINE, 5)
    expected = gptq(weight, gram, grid)
    for block in (1, 7, 40):
        monkeypatch.setitem(gptq.__globals__, "BLOCK", block)
        assert torch.allclose(gptq(weight, gram, grid), expected, rtol=1e-12)


@pytest.mark.parametrize("arguments", [{"damping": 1e6}, {"gram": torch.diag(torch.arange(1.0, 9.0))}])
def test_where_columns_have_nothing_in_common_it_is_the_nearest(arguments: dict[str, Any]) -> None:
    weight = normal(5, 8)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    arguments = {"gram": gram_of(inputs(8, 40)), **arguments}
    assert torch.equal(gptq(weight, grid=grid, **arguments), grid.nearest(weight))


def test_columns_that_repeat_each_other_share_the_error() -> None:
    """Two equal inputs: one weight takes up what the other loses."""
    x = inputs(1, 50).double().expand(50, 2)
    weight = torch.tensor([[0.4, 0.4], [1.0, 0.9]]).double()
    grid = WeightGrid(SYMMETRIC, torch.ones(2, 1).double(), torch.zeros(2, 1).double())
    assert gptq(weight, gram_of(x), grid).sum(1).tolist() == [1.0, 2.0]
    assert grid.nearest(weight).sum(1).tolist() == [0.0, 2.0]
