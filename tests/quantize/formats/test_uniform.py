from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import ConfigError
from tersor.quantize import Granularity, Quantized, uniform
from tersor.quantize.formats.grids import IntegerGrid
from zoo import normal

Array = np.ndarray[Any, np.dtype[np.float32]]
BITS = [2, 3, 4, 5, 6, 7, 8, 16]
arrays = hnp.arrays(np.float32, (4, 8), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
GRAINS = [Granularity(), Granularity.channel(), Granularity.group(8), Granularity.group(4), Granularity.group(2)]


def scheme_of(found: Quantized) -> Any:
    assert isinstance(found.grid, IntegerGrid)
    return found.grid.scheme


@settings(max_examples=100, deadline=None)
@given(arrays, st.sampled_from(BITS), st.sampled_from(GRAINS), st.booleans(), st.booleans())
def test_errors_are_at_most_half_a_step(
    array: Array, bits: int, grain: Granularity, signed: bool, symmetric: bool
) -> None:
    tensor = torch.from_numpy(array).abs() if symmetric and not signed else torch.from_numpy(array)
    found = uniform(tensor, bits, signed=signed, symmetric=symmetric, granularity=grain)
    scheme = scheme_of(found)
    assert scheme.qmin <= int(found.codes.long().min()) <= int(found.codes.long().max()) <= scheme.qmax
    assert found.scale is not None

    def spread(over: torch.Tensor) -> torch.Tensor:
        return grain.restore(grain.flat(over, (4, 8))[:, None].expand_as(grain.rows(tensor)), (4, 8)).double()

    step, zero = spread(found.scale), 0.0 if found.zero_point is None else spread(found.zero_point)
    error, noise = (found.dequantize().double() - tensor.double()).abs(), tensor.abs().double() * 1e-6
    inside = (tensor >= (scheme.qmin - zero) * step) & (tensor <= (scheme.qmax - zero) * step)
    assert bool((error <= step / 2 * 1.001 + noise)[inside].all())
    assert bool((error <= step * 1.001 + noise).all())  # a zero point is rounded: one end may be half a step short


@settings(max_examples=50, deadline=None)
@given(arrays, st.sampled_from(BITS))
def test_symmetric_codes_are_symmetric(array: Array, bits: int) -> None:
    tensor = torch.from_numpy(array)
    one, other = uniform(tensor, bits), uniform(-tensor, bits)
    assert torch.equal(one.codes.long(), -other.codes.long())
    largest = 2 ** (bits - 1) - 1
    assert int(one.codes.long().abs().max()) <= largest
    if float(tensor.abs().max()) > 1e-30:  # smaller scales than a normal float are not divided by
        assert int(one.codes.long().abs().max()) == largest


@settings(max_examples=100, deadline=None)
@given(arrays, st.booleans())
def test_finer_regions_and_more_bits_have_no_larger_steps(array: Array, symmetric: bool) -> None:
    tensor = torch.from_numpy(array)
    for kind in (GRAINS, BITS):
        steps = []
        for setting in kind:
            fields: dict[str, Any] = {"granularity": setting} if kind is GRAINS else {"bits": setting}
            scale = uniform(tensor, symmetric=symmetric, **fields).scale
            assert scale is not None
            steps.append(scale.expand(4, 1) if scale.shape[1] == 1 else scale.repeat_interleave(8 // scale.shape[1], 1))
        for coarse, fine in pairwise(steps):
            assert bool((fine <= coarse * (1 + 1e-6)).all())


def test_finer_regions_and_more_bits_are_better_on_weights() -> None:
    tensor = normal(32, 64) * normal(32, 1, seed=1).exp()
    errors = [uniform(tensor, 4, granularity=grain).error(tensor) for grain in (GRAINS[0], GRAINS[1], GRAINS[3])]
    assert errors == sorted(errors, reverse=True)
    errors = [uniform(tensor, bits).error(tensor) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-4


def ties(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    place = (tensor / scale).double()
    return (place - place.floor() - 0.5).abs() < 1e-4 * place.abs().clamp(min=1)


@settings(max_examples=100, deadline=None)
@given(arrays, st.sampled_from(BITS), st.booleans())
def test_it_agrees_with_the_kernels_of_pytorch(array: Array, bits: int, symmetric: bool) -> None:
    tensor = torch.from_numpy(array)
    found = uniform(tensor, bits, symmetric=symmetric)
    scheme, scale = scheme_of(found), found.scale
    assert scale is not None
    zero = torch.zeros(1, dtype=torch.int32) if found.zero_point is None else found.zero_point.flatten()
    kernel = torch.fake_quantize_per_tensor_affine(tensor, scale.flatten(), zero, scheme.qmin, scheme.qmax)
    differs = ~torch.isclose(found.dequantize(), kernel, rtol=1e-5, atol=1e-30)
    assert not bool((differs & ~ties(tensor, scale)).any())

    found = uniform(tensor, bits, symmetric=symmetric, granularity="channel")
    scale = found.scale
    assert scale is not None
    zero = torch.zeros(4, dtype=torch.int32) if found.zero_point is None else found.zero_point.flatten()
    kernel = torch.fake_quantize_per_channel_affine(tensor, scale.flatten(), zero, 0, scheme.qmin, scheme.qmax)
    differs = ~torch.isclose(found.dequantize(), kernel, rtol=1e-5, atol=1e-30)
    assert not bool((differs & ~ties(tensor, scale)).any())


@pytest.mark.parametrize(
    ("bits", "signed", "dtype"),
    [(8, True, torch.int8), (4, False, torch.uint8), (16, True, torch.int16), (16, False, torch.uint16)],
)
def test_codes_have_the_smallest_type(bits: int, signed: bool, dtype: torch.dtype) -> None:
    found = uniform(normal(8), bits, signed=signed, symmetric=False)
    assert found.codes.dtype == dtype
    assert {int(found.codes.long().min()), int(found.codes.long().max())} == {
        scheme_of(found).qmin,
        scheme_of(found).qmax,
    }


def test_a_group_is_a_tensor_of_its_own() -> None:
    tensor = normal(3, 8, 2)
    found = uniform(tensor, 4, granularity=Granularity.group(4)).codes
    for row in range(3):
        for place in range(2):
            for start in (0, 4):
                part = tensor[row, start : start + 4, place]
                assert torch.equal(uniform(part, 4).codes, found[row, start : start + 4, place])


def test_tokens_are_vectors_of_the_last_dimension() -> None:
    tensor = normal(2, 3, 8)
    found = uniform(tensor, granularity="token")
    assert found.scale is not None
    assert found.scale.shape == (2, 3, 1)
    assert torch.equal(found.codes[1, 2], uniform(tensor[1, 2]).codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grain", ["tensor", "channel"])
def test_mse_is_better_than_minmax(bits: int, grain: str) -> None:
    tensor = normal(16, 256)
    best = uniform(tensor, bits, granularity=grain, range_method="mse").error(tensor)
    assert best < 0.95 * uniform(tensor, bits, granularity=grain).error(tensor)


def test_percentile_saturates_an_outlier() -> None:
    tensor = torch.cat([normal(30_000), torch.tensor([1000.0])])
    found = uniform(tensor, range_method="percentile")
    assert found.scale is not None
    assert float(found.scale) < 0.05
    assert int(found.codes[-1]) == 127


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="expected 2 to 8 bits, or 16, got 9"):
        uniform(normal(4), 9)
    with pytest.raises(ConfigError, match=r"expected a range method of .* got 'median'"):
        uniform(normal(4), range_method="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"hold no negative values, got one of .*; pass signed=True or"):
        uniform(normal(40), signed=False)
    with pytest.raises(ConfigError, match="expected a divisor of the 6 entries along axis 1"):
        uniform(normal(4, 6), granularity=Granularity.group(4))
