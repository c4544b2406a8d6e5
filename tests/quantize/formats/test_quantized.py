"""What holds of every format."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tersor import quantize
from tersor.errors import ConfigError, NonFiniteError
from tersor.quantize import Granularity, Quantized
from tersor.quantize.formats.packing import unpack
from zoo import normal

Format = Callable[..., Quantized]

SCALED: dict[str, Format] = {
    "uniform 2": partial(quantize.uniform, bits=2),
    "uniform 8": quantize.uniform,
    "uniform 4 mse": partial(quantize.uniform, bits=4, range_method="mse"),
    "uniform 8 percentile": partial(quantize.uniform, range_method="percentile"),
    "uniform 3 entropy": partial(quantize.uniform, bits=3, range_method="entropy"),
    "uniform 16": partial(quantize.uniform, bits=16),
    "affine 3": partial(quantize.uniform, bits=3, symmetric=False),
    "affine 8 unsigned": partial(quantize.uniform, signed=False, symmetric=False),
    "affine 16 unsigned": partial(quantize.uniform, bits=16, signed=False, symmetric=False),
    "e4m3": quantize.float8,
    "e5m2": partial(quantize.float8, kind="e5m2"),
    "codebook 1": partial(quantize.codebook, bits=1),
    "codebook 3": partial(quantize.codebook, bits=3, initial="quantile"),
    "codebook 2 optimal": partial(quantize.codebook, bits=2, initial="optimal", keep_zero=True),
    "power of two 3": partial(quantize.power_of_two, bits=3),
    "power of two 8": partial(quantize.power_of_two, bits=8),
    "additive 4": quantize.additive_powers_of_two,
    "additive 5": partial(quantize.additive_powers_of_two, bits=5),
    "nf4": quantize.normal_float,
    "nf3 double": partial(quantize.normal_float, bits=3, double=True),
}
FORMATS: dict[str, Format] = {
    **SCALED,
    "float16": lambda tensor, granularity=None: quantize.float16(tensor),
    "bfloat16": lambda tensor, granularity=None: quantize.bfloat16(tensor),
}
GRAINS = {
    "tensor": Granularity(),
    "channel": Granularity.channel(),
    "group": Granularity.group(2),
    "token": Granularity.token(),
    "block": Granularity.block(7),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6])),
    elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, -2.5]),
)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@settings(max_examples=200, deadline=None)
@given(values, st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(GRAINS)))
def test_rounding_what_is_rounded_changes_nothing(array: np.ndarray[Any, Any], name: str, grain: str) -> None:
    tensor = torch.from_numpy(array)
    found = FORMATS[name](tensor, granularity=GRAINS[grain])
    again = found.dequantize()
    assert (again.shape, again.dtype) == (tensor.shape, tensor.dtype)
    assert bool(again.isfinite().all())
    assert same(found.encode(tensor), found.codes)
    assert same(found.encode(again), found.codes)
    zeros = torch.zeros_like(tensor)
    if "codebook" not in name or "optimal" in name:
        found_zero = Quantized(found.encode(zeros), found.grid, found.granularity, found.dtype, found.scale)
        assert torch.equal(found_zero.dequantize(), zeros)


@settings(max_examples=100, deadline=None)
@given(values, st.sampled_from(sorted(FORMATS)))
def test_rounding_keeps_order(array: np.ndarray[Any, Any], name: str) -> None:
    tensor = torch.from_numpy(array).flatten()
    rounded = FORMATS[name](tensor).dequantize()[tensor.argsort()]
    assert bool((rounded.diff() >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_type_comes_back(name: str, dtype: torch.dtype) -> None:
    tensor = normal(6, 32).to(dtype)
    found = FORMATS[name](tensor)
    assert found.dequantize().dtype == dtype
    assert same(found.encode(found.dequantize()), found.codes)
    assert found.error(tensor) == pytest.approx(FORMATS[name](tensor.float()).error(tensor), rel=0.2, abs=3e-3)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", SCALED)
def test_nothing_can_be_quantized(name: str, grain: str) -> None:
    for shape in ((0, 4), (4, 0)):
        found = SCALED[name](torch.empty(shape), granularity=GRAINS[grain])
        assert found.dequantize().shape == shape
        assert found.codes.numel() == found.packed().numel() == 0
        assert found.error(torch.empty(shape)) == 0
        assert "in" in str(found)


@pytest.mark.parametrize("name", FORMATS)
def test_a_scalar_can_be_quantized(name: str) -> None:
    assert float(FORMATS[name](torch.tensor(1.0)).dequantize()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 1e-45, 1e-38, 3e38, -3.4e38])
@pytest.mark.parametrize("name", FORMATS)
def test_constants_and_extremes_stay_finite(name: str, value: float) -> None:
    tensor = torch.full((3, 8), value)
    found = FORMATS[name](tensor)
    assert bool(found.dequantize().isfinite().all())
    assert found.scale is None or bool((found.scale.isfinite() & (found.scale > 0)).all())
    if abs(value) in {0, 1.0, 0.75}:
        assert found.error(tensor) <= (0.34 if "power" in name else 1e-3)
    mixed = FORMATS[name](torch.tensor([3.4e38, -3.4e38, 0.0, 1e-45]))
    assert bool(mixed.dequantize().isfinite().all())


@pytest.mark.parametrize("name", SCALED)
def test_doubles_beyond_the_floats_keep_their_scale(name: str) -> None:
    tensor = torch.tensor([1.7e308, -1.7e308, 0.0, 1e300], dtype=torch.float64)
    assert bool(SCALED[name](tensor).dequantize().isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_is_refused_by_place(name: str, bad: float) -> None:
    tensor = torch.ones(3, 4)
    tensor[1, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"1 of 12 values .* the first at \(1, 2\): {bad}; repair"):
        FORMATS[name](tensor)


@pytest.mark.parametrize("name", FORMATS)
def test_integers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected float16, bfloat16, float32 or float64, got torch\.int64"):
        FORMATS[name](torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", SCALED)
def test_bytes_are_those_of_what_is_stored(name: str, grain: str) -> None:
    tensor = normal(4, 6, 2)
    found = SCALED[name](tensor, granularity=GRAINS[grain])
    packed = found.packed()
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, found.bits, tensor.numel()), found.grid.unsigned(found.codes).flatten())
    parts = [packed.numel()]
    if found.scale_code is not None:
        parts += [found.scale_code.size_bytes, 4]
    elif found.scale is not None:
        parts.append(4 * found.scale.numel())
    if found.zero_point is not None:
        parts.append(math.ceil(found.zero_point.numel() * found.bits / 8))
    if name.startswith("codebook"):
        assert found.levels is not None
        parts.append(4 * found.levels.numel())
    assert found.size_bytes == sum(parts)


def test_the_textbook_formula_works_with_the_fields() -> None:
    tensor = normal(4, 6, 3)
    for grain in ("tensor", "channel", "token"):
        found = quantize.uniform(tensor, symmetric=False, granularity=grain)
        assert found.scale is not None
        assert found.zero_point is not None
        assert torch.equal((found.codes - found.zero_point) * found.scale, found.dequantize())
    table = quantize.codebook(tensor, bits=2, granularity="channel")
    assert table.levels is not None
    assert table.levels.shape == (4, 1, 1, 4)
    assert torch.equal(table.levels[2, 0, 0][table.codes[2].long()], table.dequantize()[2])


def test_errors_are_those_of_the_definition() -> None:
    tensor = normal(100)
    found = quantize.uniform(tensor, bits=4)
    error = float((found.dequantize() - tensor).norm() / tensor.norm())
    assert found.error(tensor) == pytest.approx(error, rel=1e-5)
    assert found.sqnr(tensor) == pytest.approx(-20 * math.log10(error), rel=1e-5)
    assert found.error(torch.zeros(100)) == math.inf
    assert quantize.uniform(torch.zeros(3)).sqnr(torch.zeros(3)) == math.inf


def test_it_prints_readably() -> None:
    found = quantize.uniform(normal(16, 64), bits=4, granularity=Granularity.group(32))
    text = (
        "uniform signed symmetric, 4 bits, per group of 32 along axis 1: float32 [16, 64] in 640 bytes, 16% of before"
    )
    assert str(found) == repr(found) == text


def test_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a tensor of shape \(3,\), got \(4,\)"):
        quantize.uniform(torch.ones(3)).encode(torch.ones(4))


def test_gradients_and_views_do_not_matter() -> None:
    tensor = normal(6, 4).requires_grad_()
    for name, quantized in FORMATS.items():
        found = quantized(tensor.t())
        assert not found.dequantize().requires_grad, name
        assert torch.equal(found.codes, quantized(tensor.detach().t().contiguous()).codes), name


@pytest.mark.parametrize("module", ["codebook", "floats", "normal_float", "powers", "uniform"])
def test_the_examples_are_true(module: str) -> None:
    found = doctest.testmod(import_module(f"tersor.quantize.formats.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
