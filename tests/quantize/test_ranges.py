from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.core.quantization import QuantScheme
from tersor.graph import FakeQuantize
from tersor.probe import Histogram
from tersor.quantize import ranges
from zoo import normal

SCHEMES = {
    "u8": QuantScheme(),
    "u4": QuantScheme(bits=4),
    "s8 symmetric": QuantScheme(bits=8, signed=True, symmetric=True),
}


def histogram(values: torch.Tensor) -> Histogram:
    found = Histogram()
    found.widen(values)
    found.count(values)
    return found


def error(found: Histogram, low: float, high: float, scheme: QuantScheme) -> float:
    """Squared rounding error over the histogram, by the module that will do the rounding."""
    quantizer = FakeQuantize(scheme)
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    values = found.centres
    return float((found.counts * (quantizer(values.float()).double() - values).square()).sum())


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([2.0**exponent for exponent in range(-20, 20, 4)]),
    st.sampled_from(sorted(SCHEMES)),
)
def test_mse_is_never_worse_than_minmax(values: np.ndarray[Any, Any], scale: float, name: str) -> None:
    found, scheme = histogram(torch.from_numpy(values * np.float32(scale))), SCHEMES[name]
    best = error(found, *ranges.mse(found, scheme), scheme)
    assert best <= error(found, *ranges.minmax(found, scheme), scheme) * (1 + 1e-3) + 1e-30


@pytest.mark.parametrize("name", SCHEMES)
def test_mse_cuts_an_outlier_off_that_costs_more_than_it_is_worth(name: str) -> None:
    found, scheme = histogram(torch.cat([normal(50_000), torch.tensor([60.0, -60.0])])), SCHEMES[name]
    low, high = ranges.mse(found, scheme)
    assert high < 57
    assert low > -57
    assert error(found, low, high, scheme) < 0.95 * error(found, *ranges.minmax(found, scheme), scheme)


def test_mse_is_the_best_of_its_grid() -> None:
    found, scheme = histogram(normal(20_000)), QuantScheme(bits=4)
    low, high = ranges.mse(found, scheme)
    chosen = error(found, low, high, scheme)
    for shrink in np.linspace(1.0, 0.04, 64):
        assert chosen <= error(found, found.low * shrink, found.high * shrink, scheme) * (1 + 1e-4)
    assert 0.3 < high / found.high < 0.95  # at four bits some saturation is worth it


def test_mse_keeps_a_range_that_starts_at_zero() -> None:
    found = histogram(normal(10_000).relu())
    assert ranges.mse(found, QuantScheme())[0] == 0


def test_minmax_is_the_whole_range() -> None:
    found = histogram(torch.tensor([-3.0, 0.5, 8.0]))
    assert ranges.minmax(found, QuantScheme()) == (-3.0, 8.0)


def test_percentile_cuts_the_rarest_values_off_both_ends() -> None:
    found = histogram(torch.cat([torch.linspace(-1, 1, 60_000), torch.tensor([50.0, -50.0])]))
    low, high = ranges.percentile(found, QuantScheme())
    width = 100 / len(found.counts)
    assert -1 - width <= low <= -1 + width
    assert 1 - width <= high <= 1 + width


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32)))
def test_percentile_lies_inside_the_range_and_holds_the_values(values: np.ndarray[Any, Any]) -> None:
    found = histogram(torch.from_numpy(values))
    low, high = ranges.percentile(found, QuantScheme())
    slack = 1e-5 * (found.high - found.low) + 1e-12
    assert found.low - slack <= low <= high <= found.high + slack
    inside = (values >= low - slack) & (values <= high + slack)
    assert inside.all()  # fewer than 10,000 values: none is rarer than one in 10,000


@pytest.mark.parametrize("method", ranges.__all__)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_has_a_range_that_represents_it(method: str, value: float) -> None:
    found = histogram(torch.full((40,), value))
    low, high = getattr(ranges, method)(found, QuantScheme())
    quantizer = FakeQuantize(QuantScheme())
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    assert float(quantizer(torch.tensor([value]))) == pytest.approx(value, rel=1e-6)
