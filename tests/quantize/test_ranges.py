from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.core.quantization import QuantScheme
from tersor.graph import FakeQuantize
from tersor.probe import Histogram
from tersor.quantize import ranges
from tersor.quantize.ranges.base import Points, codes_of
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


def chosen_by(method: str, found: Histogram, scheme: QuantScheme) -> tuple[float, float]:
    low, high = getattr(ranges, method)(Points.of_histogram(found), scheme)
    return float(low), float(high)


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
    points = Points.of_histogram(found)

    def exact(method: str) -> float:
        """In float64, as ranges are chosen: a value halfway between two codes may be rounded otherwise in float32."""
        codes, step, zero_point = codes_of(points.values, *getattr(ranges, method)(points, scheme), scheme)
        return float((points.counts * ((codes - zero_point) * step - points.values).square()).sum())

    assert exact("mse") <= exact("minmax") * (1 + 1e-3) + 1e-30
    for method in ("mse", "minmax"):
        low, high = (torch.tensor([end]) for end in chosen_by(method, found, scheme))
        step, _ = scheme.parameters(low.double(), high.double(), smallest=1e-300)
        places = torch.cat([points.values[0][found.counts > 0], low.double()]) / step
        assume(bool(((places - places.floor() - 0.5).abs() > 1e-4).all()))  # no ties
    best = error(found, *chosen_by("mse", found, scheme), scheme)
    assert best <= error(found, *chosen_by("minmax", found, scheme), scheme) * (1 + 1e-3) + 1e-30


@pytest.mark.parametrize("name", SCHEMES)
def test_mse_cuts_an_outlier_off_that_costs_more_than_it_is_worth(name: str) -> None:
    found, scheme = histogram(torch.cat([normal(50_000), torch.tensor([60.0, -60.0])])), SCHEMES[name]
    low, high = chosen_by("mse", found, scheme)
    assert high < 57
    assert low > -57
    assert error(found, low, high, scheme) < 0.95 * error(found, *chosen_by("minmax", found, scheme), scheme)


def test_mse_is_the_best_of_its_grid() -> None:
    found, scheme = histogram(normal(20_000)), QuantScheme(bits=4)
    low, high = chosen_by("mse", found, scheme)
    chosen = error(found, low, high, scheme)
    for shrink in np.linspace(1.0, 0.04, 64):
        assert chosen <= error(found, found.low * shrink, found.high * shrink, scheme) * (1 + 1e-4)
    assert 0.3 < high / found.high < 0.95  # at four bits some saturation is worth it


def test_mse_keeps_a_range_that_starts_at_zero() -> None:
    found = histogram(normal(10_000).relu())
    assert chosen_by("mse", found, QuantScheme())[0] == 0


def test_minmax_is_the_whole_range() -> None:
    found = histogram(torch.tensor([-3.0, 0.5, 8.0]))
    assert chosen_by("minmax", found, QuantScheme()) == (-3.0, 8.0)


def test_percentile_cuts_the_rarest_values_off_both_ends() -> None:
    found = histogram(torch.cat([torch.linspace(-1, 1, 60_000), torch.tensor([50.0, -50.0])]))
    low, high = chosen_by("percentile", found, QuantScheme())
    width = 100 / len(found.counts)
    assert -1 - width <= low <= -1 + width
    assert 1 - width <= high <= 1 + width


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32)))
def test_percentile_lies_inside_the_range_and_holds_the_values(values: np.ndarray[Any, Any]) -> None:
    found = histogram(torch.from_numpy(values))
    low, high = chosen_by("percentile", found, QuantScheme())
    slack = 1e-5 * (found.high - found.low) + 1e-12
    assert found.low - slack <= low <= high <= found.high + slack
    inside = (values >= low - slack) & (values <= high + slack)
    assert inside.all()  # fewer than 10,000 values: none is rarer than one in 10,000


@pytest.mark.parametrize("method", ranges.__all__)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_has_a_range_that_represents_it(method: str, value: float) -> None:
    found = histogram(torch.full((40,), value))
    low, high = chosen_by(method, found, QuantScheme())
    quantizer = FakeQuantize(QuantScheme())
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    assert float(quantizer(torch.tensor([value]))) == pytest.approx(value, rel=1e-6)


def test_entropy_cuts_rare_outliers_off_and_keeps_what_is_evenly_spread() -> None:
    found, even = histogram(torch.cat([normal(50_000), torch.tensor([60.0, -60.0])])), histogram(torch.rand(50_000))
    for scheme in SCHEMES.values():
        low, high = chosen_by("entropy", found, scheme)
        assert 3 < high < 20
        assert -20 < low < -3
        assert chosen_by("entropy", even, scheme)[1] > 0.9 * even.high


def kl_by_hand(found: Histogram, share: float, codes: int) -> float:
    """Migacz 2017 in plain loops, of an unsigned range that starts at zero."""
    inside = [bin for bin, centre in enumerate(found.centres.tolist()) if centre <= found.high * share]
    counts = found.counts.tolist()
    counts[0] = min(counts[0], counts[1])
    occupied = [bin for bin in inside if counts[bin] > 0]
    true = {bin: counts[bin] for bin in occupied}
    true[occupied[-1]] += sum(counts[occupied[-1] + 1 :])
    levels: dict[int, list[int]] = {}
    scale = found.high * share / (codes - 1)
    for bin in occupied:
        levels.setdefault(int(np.rint(float(found.centres[bin]) / scale)), []).append(bin)
    spread = {bin: sum(counts[one] for one in bins) / len(bins) for bins in levels.values() for bin in bins}
    all_true, all_spread = sum(true.values()), sum(spread.values())
    return sum(
        true[bin] / all_true * float(np.log(true[bin] / all_true / (spread[bin] / all_spread))) for bin in occupied
    )


def test_entropy_is_the_least_divergence_of_its_grid() -> None:
    found, scheme = histogram(torch.cat([normal(20_000).abs(), torch.tensor([0.0, 12.0])])), QuantScheme(bits=4)
    low, high = chosen_by("entropy", found, scheme)
    costs = {share: kl_by_hand(found, share, 16) for share in np.linspace(1.0, 0.04, 64)}
    assert low == 0
    assert high == pytest.approx(min(costs, key=costs.__getitem__) * found.high, rel=1e-6)


def test_entropy_of_more_codes_than_bins_is_the_whole_range() -> None:
    found = histogram(normal(1000))
    assert chosen_by("entropy", found, QuantScheme(bits=16)) == (found.low, found.high)


def test_a_moving_average_forgets_slowly() -> None:
    found = Histogram()
    for high in (1.0, 1.0, 11.0):
        found.widen(torch.tensor([-2.0, high]))
    assert (found.low, found.high) == (-2.0, 11.0)
    assert chosen_by("moving_average", found, QuantScheme()) == pytest.approx((-2.0, 2.0))


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(2, 60)), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(ranges.__all__),
    st.sampled_from(sorted(SCHEMES)),
)
def test_rows_get_the_ranges_that_each_would_get_alone(values: np.ndarray[Any, Any], method: str, name: str) -> None:
    rows, choose = torch.from_numpy(values), getattr(ranges, method)
    low, high = choose(Points.of_rows(rows), SCHEMES[name])
    for index, row in enumerate(rows):
        alone = choose(Points.of_rows(row[None]), SCHEMES[name])
        assert (float(low[index]), float(high[index])) == (float(alone[0]), float(alone[1]))
        assert low[index] >= min(0, row.min())
        assert high[index] <= max(0, row.max())


def test_long_rows_are_sampled_and_their_ends_exact() -> None:
    row = torch.cat([torch.linspace(-1, 1, 300_000), torch.tensor([5.0])])
    points = Points.of_rows(row[None])
    assert points.values.shape[1] < 100_000
    assert (float(points.low), float(points.high)) == (-1.0, 5.0)
