from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_problems import SYMMETRIC
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.quantize.rounding import WeightGrid, hqq
from zoo import normal, relative


def errors_of(weight: Tensor, values: Tensor, start: WeightGrid, p: float = 0.7) -> Tensor:
    """``Σ |W − Ŵ|^p`` of each group, in units of the scale that covers its range."""
    unit = start.expanded(weight.shape[1])[0].double()
    errors = ((weight.double() - values.double()) / unit).abs().pow(p)
    return errors.reshape(start.scale.numel(), -1).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 20),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    signed=st.booleans(),
    p=st.sampled_from([0.3, 0.7, 1.0]),
    power=st.integers(-60, 60),
    kind=st.sampled_from(["normal", "heavy", "positive", "far", "zero", "few"]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_never_worse_than_the_whole_range(
    rows: int,
    size: int,
    groups: int,
    bits: int,
    signed: bool,
    p: float,
    power: int,
    kind: str,
    double: bool,
    seed: int,
) -> None:
    weight = normal(rows, size * groups, seed=seed)
    weight = {
        "normal": weight,
        "heavy": weight**3,
        "positive": weight.abs(),
        "far": weight + 50,
        "zero": 0 * weight,
        "few": weight.round(),
    }[kind] * 2.0**power
    weight = weight.double() if double else weight
    before, scheme = weight.clone(), QuantScheme(bits=bits, signed=signed)
    start = WeightGrid.fitted(weight, scheme, groups)
    grid, values = hqq(weight, scheme, groups, p=p)
    assert values.dtype == weight.dtype
    assert torch.equal(values, grid.nearest(weight))
    assert grid.scale.shape == (rows, groups)
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert scheme.qmin <= float(grid.zero_point.min()) <= float(grid.zero_point.max()) <= scheme.qmax
    found, least = (errors_of(weight, one, start, p) for one in (values, start.nearest(weight)))
    assert bool((found <= least * (1 + 1e-5)).all())
    assert torch.equal(weight, before)
    assert torch.equal(hqq(weight, scheme, groups, p=p)[1], values)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.85), (3, 0.95), (4, 0.97)])
def test_it_is_clearly_better_on_weights_that_lie_around_zero(bits: int, share: float) -> None:
    weight, scheme = normal(64, 64), QuantScheme(bits=bits)
    start = WeightGrid.fitted(weight, scheme)
    found = errors_of(weight, hqq(weight, scheme)[1], start).sum()
    assert found < share * errors_of(weight, start.nearest(weight), start).sum()


def test_it_finds_the_grid_that_weights_lie_on() -> None:
    """All but one: the outlier stretches the range, and is forgiven."""
    codes = torch.arange(64).reshape(1, 64) % 15
    weight = 0.125 * (codes - 6)
    weight[0, 40] = 1.2
    grid, values = hqq(weight, QuantScheme(bits=4))
    assert grid.scale.item() == pytest.approx(0.125, rel=0.01)
    right = values.isclose(weight, atol=0.01)
    assert right.sum() == 63
    start = WeightGrid.fitted(weight, QuantScheme(bits=4))
    assert start.nearest(weight).isclose(weight, atol=0.01).sum() < 40


def test_without_rounds_it_is_the_whole_range() -> None:
    weight, scheme = normal(4, 8), QuantScheme(bits=3)
    grid, values = hqq(weight, scheme, 2, iterations=0)
    start = WeightGrid.fitted(weight, scheme, 2)
    assert torch.equal(grid.scale, start.scale)
    assert torch.equal(grid.zero_point, start.zero_point)
    assert torch.equal(values, start.nearest(weight))


def test_groups_are_fitted_on_their_own() -> None:
    weight, scheme = normal(3, 32), QuantScheme(bits=3)
    grid, values = hqq(weight, scheme, 4)
    for group in range(4):
        part = slice(8 * group, 8 * group + 8)
        alone, expected = hqq(weight[:, part], scheme)
        assert torch.equal(alone.scale[:, 0], grid.scale[:, group])
        assert torch.equal(expected, values[:, part])


@pytest.mark.parametrize("power", [-50, -3, 40])
def test_the_size_of_the_weights_does_not_matter(power: int) -> None:
    weight, scheme = normal(4, 32), QuantScheme(bits=3)
    assert torch.equal(hqq(weight * 2.0**power, scheme)[1], hqq(weight, scheme)[1] * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_come_back_as_they_went_in(dtype: torch.dtype) -> None:
    weight, scheme = normal(4, 32), QuantScheme(bits=3)
    grid, values = hqq(weight.to(dtype), scheme)
    assert values.dtype == dtype
    assert grid.scale.dtype == torch.float32
    assert relative(values, hqq(weight, scheme)[1]) < 0.05


def test_wrong_settings_are_refused() -> None:
    weight, scheme = normal(4, 8), QuantScheme(bits=3)
    wrong: dict[str, Any]
    for wrong in ({"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": -1.0}, {"iterations": -1}, {"groups": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            hqq(weight, scheme, **wrong)
    with pytest.raises(ConfigError, match="symmetric"):
        hqq(weight, SYMMETRIC)
    with pytest.raises(ConfigError, match="O, K"):
        hqq(weight[0], scheme)
    with pytest.raises(NonFiniteError):
        hqq(weight * torch.nan, scheme)
