from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError
from tersor.quantize import Granularity, codebook, uniform
from tersor.quantize.formats.kmeans import kmeans
from zoo import normal

small = hnp.arrays(np.float64, st.integers(1, 7), elements=st.floats(-100, 100).map(lambda value: round(value, 2)))


def cost(values: Tensor, weights: Tensor, centroids: Tensor) -> float:
    return float((weights * (values[:, None] - centroids).square().amin(1)).sum())


def brute(values: Tensor, weights: Tensor, count: int) -> float:
    """The least cost of all divisions into intervals."""
    order = values.argsort()
    values, weights = values[order], weights[order]
    least = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(values) + 1), count - 1):
        total = 0.0
        for start, end in itertools.pairwise([0, *cuts, len(values)]):
            part, mass = values[start:end], weights[start:end]
            if float(mass.sum()) > 0:
                total += float((mass * (part - (mass * part).sum() / mass.sum()).square()).sum())
        least = min(least, total)
    return least


@settings(max_examples=60, deadline=None)
@given(small, st.integers(1, 2), st.integers(0, 1000), st.booleans())
def test_the_optimum_is_that_of_all_divisions(
    array: np.ndarray[Any, Any], bits: int, seed: int, weighted: bool
) -> None:
    values = torch.from_numpy(array)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(values), generator=generator, dtype=torch.float64).round(decimals=1) + (
        0 if weighted else 1
    )
    weights = weights if weighted else torch.ones_like(values)
    found = kmeans(values[None], weights[None], 1 << bits, initial="optimal", keep_zero=False)[0]
    assert bool((found.diff() >= 0).all())
    assert cost(values, weights, found) == pytest.approx(brute(values, weights, 1 << bits), rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(small, st.sampled_from(["linear", "quantile"]), st.integers(1, 3))
def test_the_rounds_end_at_means_of_what_is_nearest(array: np.ndarray[Any, Any], initial: Any, bits: int) -> None:
    values = torch.from_numpy(array)
    found = kmeans(values[None], torch.ones_like(values)[None], 1 << bits, initial=initial, keep_zero=False)[0]
    assert bool((found.diff() >= 0).all())
    middle = (found[1:] + found[:-1]) / 2
    nearest = torch.searchsorted(middle, values)
    for index in nearest.unique().tolist():
        assert float(found[index]) == pytest.approx(float(values[nearest == index].mean()), rel=1e-9, abs=1e-9)


def test_more_regions_and_more_entries_are_never_worse() -> None:
    tensor = normal(8, 32) * normal(8, 1, seed=1).exp()
    grains = [Granularity(), Granularity.channel(), Granularity.group(16), Granularity.group(8)]
    errors = [codebook(tensor, 2, granularity=grain, initial="optimal").error(tensor) for grain in grains]
    assert errors == sorted(errors, reverse=True)
    errors = [codebook(tensor, bits, initial="optimal").error(tensor) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("initial", ["linear", "quantile", "optimal"])
def test_it_is_better_than_equal_steps_and_deterministic(initial: Any) -> None:
    tensor = normal(64, 128)
    one, two = (codebook(tensor, 4, initial=initial) for _ in range(2))
    assert torch.equal(one.codes, two.codes)
    assert one.error(tensor) < 0.9 * uniform(tensor, 4, range_method="mse").error(tensor)


def test_the_optimum_is_no_worse_where_entries_are_merged() -> None:
    tensor = torch.cat([normal(5000), torch.tensor([30.0, 31.0, -50.0])])
    best = codebook(tensor, 4, initial="optimal").error(tensor)
    assert best <= codebook(tensor, 4).error(tensor)
    assert best <= codebook(tensor, 4, initial="quantile").error(tensor)


def test_what_weighs_more_is_rounded_better() -> None:
    tensor, weight = normal(2000), torch.ones(2000)
    weight[:200] = 100
    plain, weighted = codebook(tensor, 3, initial="optimal"), codebook(tensor, 3, weight=weight, initial="optimal")
    heavy = slice(0, 200)

    def loss(rounded: Tensor) -> float:
        return float((weight * (rounded - tensor).square()).sum())

    assert loss(weighted.dequantize()) < loss(plain.dequantize())
    assert float((weighted.dequantize() - tensor)[heavy].norm()) < float((plain.dequantize() - tensor)[heavy].norm())
    assert torch.equal(codebook(tensor, 3, weight=torch.full((2000,), 4.0)).codes, codebook(tensor, 3).codes)


def test_entries_without_weight_do_not_matter() -> None:
    tensor, weight = torch.tensor([0.0, 0.1, 5.0, 5.1, 100.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = codebook(tensor, 1, weight=weight, initial="optimal").dequantize()
    assert found.tolist() == pytest.approx([0.05, 0.05, 5.05, 5.05, 5.05])
    assert codebook(tensor, 2, weight=torch.zeros(5)).dequantize().isfinite().all()


@pytest.mark.parametrize("initial", ["linear", "quantile", "optimal"])
def test_what_was_pruned_stays_zero(initial: Any) -> None:
    tensor = normal(16, 64) + 0.3
    tensor[normal(16, 64, seed=1) > 0] = 0
    for grain in ("tensor", "channel"):
        found = codebook(tensor, 3, initial=initial, keep_zero=True, granularity=grain).dequantize()
        assert bool((found[tensor == 0] == 0).all())
        assert float((found - tensor).norm() / tensor.norm()) < 0.3
    assert bool((codebook(tensor, 3, initial=initial).dequantize()[tensor == 0] != 0).any())


def test_few_different_numbers_are_exact() -> None:
    tensor = torch.tensor([0.1, -3.0, 1e-7, 12345.678])[torch.arange(100) % 4].reshape(10, 10)
    assert torch.equal(codebook(tensor, 2, initial="optimal").dequantize(), tensor)


def test_a_short_last_block_is_filled_with_nothing() -> None:
    tensor = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0])
    found = codebook(tensor, 1, granularity=Granularity.block(4), initial="optimal")
    assert found.dequantize().tolist() == [5.5, 5.5, 7.5, 7.5, 9.0]


def test_a_region_is_a_tensor_of_its_own() -> None:
    tensor = normal(4, 40)
    found = codebook(tensor, 2, granularity="channel").dequantize()
    for row in range(4):
        assert torch.equal(codebook(tensor[row], 2).dequantize(), found[row])


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="expected 1 to 8 bits, got 0"):
        codebook(normal(3), 0)
    with pytest.raises(ConfigError, match=r"expected initial to be one of .* got 'random'"):
        codebook(normal(3), initial="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected weights of the tensor's shape \(3,\), got \(4,\)"):
        codebook(normal(3), weight=torch.ones(4))
    with pytest.raises(ConfigError, match=r"expected weights that are not negative, got -1\.0"):
        codebook(normal(3), weight=-torch.ones(3))
    with pytest.raises(NonFiniteError, match="codebook weight: 3 of 3"):
        codebook(normal(3), weight=torch.full((3,), torch.nan))
