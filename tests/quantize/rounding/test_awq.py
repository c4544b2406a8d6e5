from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_problems import SYMMETRIC, gram_of, inputs, unequal
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import output_error
from tersor.quantize.rounding import WeightGrid, awq_scale
from zoo import normal


def nearest(weight: Tensor) -> Tensor:
    return WeightGrid.fitted(weight, SYMMETRIC).nearest(weight)


def error(weight: Tensor, scale: Tensor, gram: Tensor) -> float:
    return output_error(weight, nearest(weight * scale) / scale, gram)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 12),
    samples=st.integers(1, 40),
    power=st.sampled_from([(0, 0), (-60, 0), (60, 0), (0, -30), (0, 30)]),
    dead=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_never_worse_than_no_scaling(
    rows: int, columns: int, samples: int, power: tuple[int, int], dead: bool, double: bool, seed: int
) -> None:
    weight, x = normal(rows, columns, seed=seed) * 2.0 ** power[0], unequal(inputs(columns, samples, seed), seed)
    x = x * 2.0 ** power[1]
    if dead:
        x[:, columns // 2] = 0
    if double:
        weight, x = weight.double(), x.double()
    magnitude, gram = x.abs().mean(0), gram_of(x)
    before = weight.clone(), magnitude.clone(), gram.clone()
    scale = awq_scale(weight, magnitude, gram, nearest)
    assert scale.shape == (columns,)
    assert bool((scale > 0).all())
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
    assert error(weight, scale, gram) <= error(weight, torch.ones(columns), gram) * (1 + 1e-6)
    assert torch.equal(awq_scale(weight, magnitude, gram, nearest), scale)
    assert all(map(torch.equal, (weight, magnitude, gram), before))


def test_columns_that_large_inputs_meet_are_scaled_up() -> None:
    x = inputs(32, 200)
    x[:, :2] *= 30
    weight, magnitude, gram = normal(16, 32), x.abs().mean(0), gram_of(x)
    scale = awq_scale(weight, magnitude, gram, nearest)
    assert float(scale[:2].min()) > 1.5 * float(scale[2:].max())
    assert error(weight, scale, gram) < 0.5 * error(weight, torch.ones(32), gram)
    order = magnitude.argsort()
    assert torch.equal(scale[order], scale[order].sort().values)


def test_it_is_the_best_of_the_exponents() -> None:
    x = unequal(inputs(12, 100))
    weight, magnitude, gram = normal(6, 12).double(), x.abs().mean(0).double(), gram_of(x).double()
    tried = []
    for exponent in range(20):
        scale = magnitude ** (exponent / 19)
        tried.append(error(weight, scale / (scale.max() * scale.min()).sqrt(), gram))
    assert error(weight, awq_scale(weight, magnitude, gram, nearest), gram) == pytest.approx(min(tried), rel=1e-9)
    assert 0 < tried.index(min(tried)) < 19
    assert torch.equal(awq_scale(weight, magnitude, gram, nearest, grid=1), torch.ones(12).double())


def test_weights_that_share_their_input_share_the_scale() -> None:
    x = unequal(inputs(12, 100), seed=2)
    first, second, gram, magnitude = normal(6, 12), normal(3, 12, seed=4), gram_of(x), x.abs().mean(0)
    shared = awq_scale([first, second], magnitude, gram, nearest)
    stacked = awq_scale(torch.cat([first, second]), magnitude, gram, nearest)  # scales are per row
    assert torch.equal(shared, stacked)
    assert torch.equal(awq_scale([first], magnitude, gram, nearest), awq_scale(first, magnitude, gram, nearest))
    assert not torch.equal(shared, awq_scale(first, magnitude, gram, nearest))


def test_where_nothing_is_to_be_gained_it_is_one() -> None:
    weight, x = normal(5, 8), inputs(8, 60)
    one = torch.ones(8)
    assert torch.equal(awq_scale(weight, one * 3, gram_of(x), nearest), one)
    assert torch.equal(awq_scale(weight, x.abs().mean(0), gram_of(x), lambda weight: weight.clone()), one)
    assert torch.equal(awq_scale(weight, torch.zeros(8), torch.zeros(8, 8), nearest), one)
    assert torch.equal(awq_scale(weight, x.abs().mean(0), gram_of(x), lambda weight: weight * torch.nan), one)


def test_the_unit_of_the_magnitudes_does_not_matter() -> None:
    x = unequal(inputs(8, 60))
    expected = awq_scale(normal(5, 8), x.abs().mean(0), gram_of(x), nearest)
    for unit in (1e-20, 1e20):
        assert torch.allclose(awq_scale(normal(5, 8), x.abs().mean(0) * unit, gram_of(x), nearest), expected, rtol=1e-3)


def test_narrow_weights_are_rounded_in_their_type() -> None:
    x = unequal(inputs(8, 60))
    seen = []

    def quantize(weight: Tensor) -> Tensor:
        seen.append(weight.dtype)
        return nearest(weight)

    scale = awq_scale(normal(5, 8).bfloat16(), x.abs().mean(0), gram_of(x), quantize)
    assert scale.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


def test_what_does_not_fit_is_refused() -> None:
    weight, x = normal(5, 8), inputs(8, 60)
    gram, magnitude = gram_of(x), x.abs().mean(0)
    for arguments in (
        (normal(5, 7), magnitude, gram),
        ([weight, normal(5, 7)], magnitude, gram),
        (normal(5, 8, 1), magnitude, gram),
        ([], magnitude, gram),
        (weight, magnitude[:7], gram),
        (weight, magnitude[None], gram),
        (weight, -magnitude, gram),
        (weight, magnitude, gram[:7]),
    ):
        with pytest.raises(ConfigError, match=r"expected|negative"):
            awq_scale(*arguments, nearest)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="grid"):
        awq_scale(weight, magnitude, gram, nearest, grid=0)
    with pytest.raises(ConfigError, match="quantize"):
        awq_scale(weight, magnitude, gram, lambda weight: weight[:, :3])
    for name, broken in (
        ("weight", (weight * torch.nan, magnitude, gram)),
        ("magnitude", (weight, magnitude / 0, gram)),
        ("gram", (weight, magnitude, gram * torch.nan)),
    ):
        with pytest.raises(NonFiniteError, match=name):
            awq_scale(*broken, nearest)
