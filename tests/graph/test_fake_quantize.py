from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.errors import UnsupportedError
from tersor.graph import FakeQuantize
from tersor.graph.operators import quantize_dequantize

Array = np.ndarray[Any, np.dtype[np.float32]]

finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=finite)
schemes = st.builds(
    lambda bits, kind: QuantScheme(bits=bits, signed=kind != "unsigned", symmetric=kind == "symmetric"),
    st.integers(2, 8),
    st.sampled_from(["unsigned", "signed", "symmetric"]),
)


def reference(x: Array, low: Array, high: Array, scheme: QuantScheme) -> tuple[Array, Array, Array]:
    """Jacob et al. 2018 by hand: values, scale and zero point for ranges that broadcast against `x`."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    qmin = -(2 ** (scheme.bits - 1)) if scheme.signed else 0
    qmax = qmin + 2**scheme.bits - 1
    if scheme.symmetric:
        scale = np.maximum(np.maximum(-low, high) / np.float32(qmax), np.float32(1e-9))
        zero = np.zeros_like(scale)
    else:
        scale = np.maximum((high - low) / np.float32(qmax - qmin), np.float32(1e-9))
        zero = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    return ((np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero) * scale).astype(np.float32), scale, zero


def calibrated(scheme: QuantScheme, low: Array, high: Array) -> FakeQuantize:
    quantizer = FakeQuantize(scheme)
    quantizer.set_range(torch.from_numpy(np.atleast_1d(low)), torch.from_numpy(np.atleast_1d(high)))
    return quantizer


def agrees(found: Array, expected: Array, x: Array, scale: Array, zero: Array) -> bool:
    """Equal, but for values that lie in the middle between two codes: those may go either way."""
    position = x / scale + zero
    tie = np.abs(position - np.floor(position) - 0.5) < 1e-4 * np.maximum(1, np.abs(position))
    close = np.abs(found - expected) <= 1e-6 * np.abs(expected) + 1e-12
    neighbour = np.abs(found - expected) <= scale * 1.001
    return bool((close | (tie & neighbour)).all())


@settings(max_examples=200, deadline=None)
@given(arrays, schemes, st.floats(0, 2, width=32))
def test_a_whole_tensor_is_rounded_like_the_reference(x: Array, scheme: QuantScheme, share: float) -> None:
    low, high = x.min() * np.float32(share), x.max() * np.float32(share)  # a share below 1 saturates
    expected, scale, zero = reference(x, low, high, scheme)
    quantizer = calibrated(scheme, low, high)
    assert agrees(quantizer(torch.from_numpy(x)).numpy(), expected, x, scale, zero)
    assert float(quantizer.zero_point) == float(zero)


@settings(max_examples=200, deadline=None)
@given(arrays, schemes, st.data())
def test_channels_are_rounded_like_the_reference(x: Array, scheme: QuantScheme, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, x.ndim - 1))
    others = tuple(other for other in range(x.ndim) if other != axis)
    low, high = x.min(others, keepdims=True), x.max(others, keepdims=True)
    expected, scale, zero = reference(x, low, high, scheme)
    quantizer = calibrated(scheme.model_copy(update={"axis": axis}), low.flatten(), high.flatten())
    assert agrees(quantizer(torch.from_numpy(x)).numpy(), expected, x, scale, zero)


@settings(max_examples=200, deadline=None)
@given(arrays, schemes, st.booleans())
def test_codes_are_exactly_what_is_rounded_to(x: Array, scheme: QuantScheme, channels: bool) -> None:
    axes = tuple(range(1, x.ndim)) if channels else None
    low, high = x.min(axes), x.max(axes)
    quantizer = calibrated(scheme.model_copy(update={"axis": 0 if channels else None}), low, high)
    values = torch.from_numpy(x)
    codes = quantizer.codes(values)
    assert codes.dtype == (torch.int8 if scheme.signed else torch.uint8)
    assert scheme.qmin <= int(codes.min())
    assert int(codes.max()) <= scheme.qmax
    shape = (-1, *[1] * (x.ndim - 1)) if channels else (1,)
    scale, zero = quantizer.scale.reshape(shape), quantizer.zero_point.reshape(shape)
    assert torch.equal((codes.float() - zero) * scale, quantizer(values))
    assert torch.equal(quantizer(quantizer(values)), quantizer(values))


@settings(max_examples=200, deadline=None)
@given(schemes, finite, finite)
def test_zero_is_exact_and_the_range_is_covered(scheme: QuantScheme, one: float, two: float) -> None:
    low, high = np.float32(min(one, two)), np.float32(max(one, two))
    quantizer = calibrated(scheme, low, high)
    assert quantizer(torch.zeros(1)).tolist() == [0.0]
    ends = torch.tensor([low, high])
    assert bool(((quantizer(ends) - ends).abs() <= quantizer.scale * 1.001).all())


def test_codes_of_halves_are_the_ones_rounded_to() -> None:
    """Values between two codes: PyTorch's kernel and a plain division disagree on some of them."""
    values = torch.arange(-126.0, 127.0).repeat(4, 1) / 2 * torch.tensor([[0.109375], [0.3], [0.7], [1.1]])
    quantizer = FakeQuantize(QuantScheme(bits=7, signed=True, symmetric=True, axis=0))
    quantizer.set_range(values.amin(1), values.amax(1))
    plain = (values / quantizer.scale[:, None]).round().to(torch.int8)
    assert not torch.equal(plain, quantizer.codes(values)), "these values do not show the difference"
    assert torch.equal(quantizer.codes(values).float() * quantizer.scale[:, None], quantizer(values))


@pytest.mark.parametrize("scheme", [QuantScheme(), QuantScheme(bits=8, signed=True, symmetric=True)], ids=["u8", "s8"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-6, 0.7, -0.7, 5e4, -3e38])
def test_a_constant_tensor_stays_finite_and_near(scheme: QuantScheme, value: float) -> None:
    quantizer = calibrated(scheme, np.float32(value), np.float32(value))
    found = quantizer(torch.full((4,), value))
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(found, torch.full((4,), value), rtol=1e-6, atol=1e-9)


def test_a_channel_of_zeros_stays_zero_and_finite() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    quantizer = FakeQuantize(QuantScheme(bits=8, signed=True, symmetric=True, axis=0))
    quantizer.set_range(weight.amin(1), weight.amax(1))
    found = quantizer(weight)
    assert bool((quantizer.scale > 0).all())
    assert bool(torch.isfinite(found).all())
    assert (found[1] == 0).all()
    assert (quantizer.codes(weight)[1] == 0).all()
    assert torch.allclose(found[[0, 2]], weight[[0, 2]], atol=float(quantizer.scale.max()) / 2)


def test_until_it_is_calibrated_it_changes_nothing() -> None:
    quantizer, values = FakeQuantize(QuantScheme()), torch.tensor([-1.3, 0.2, 1e9])
    assert quantizer(values) is values
    quantizer.set_range(torch.tensor([0.0]), torch.tensor([1.0]))
    assert not torch.equal(quantizer(values), values)


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    quantizer = calibrated(QuantScheme(), np.float32(-1), np.float32(1))
    values = torch.tensor([-3.0, -0.5, 0.3, 3.0], requires_grad=True)
    quantizer(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 0]


@settings(max_examples=200, deadline=None)
@given(arrays, schemes)
def test_with_and_without_gradients_it_rounds_alike(x: Array, scheme: QuantScheme) -> None:
    """PyTorch's kernel, which knows the gradient, and the faster operations without."""
    quantizer, values = calibrated(scheme, x.min(), x.max() / 2), torch.from_numpy(x)
    with_gradient = quantizer(values.clone().requires_grad_())
    assert with_gradient.requires_grad
    assert torch.equal(quantizer(values), with_gradient)
    with torch.no_grad():
        assert torch.equal(quantizer(values.clone().requires_grad_()), with_gradient)
    assert quantizer(values.flatten()[0]).shape == ()


def test_it_survives_a_state_dict() -> None:
    quantizer = calibrated(QuantScheme(), np.float32(-1), np.float32(3))
    other = FakeQuantize(QuantScheme())
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.scale, quantizer.scale)
    assert torch.equal(other.zero_point, quantizer.zero_point)


@settings(max_examples=100, deadline=None)
@given(arrays)
def test_the_lowered_operator_rounds_alike(x: Array) -> None:
    """`quantize_dequantize` is what runtimes get in place of the module."""
    quantizer = calibrated(QuantScheme(), x.min(), x.max())
    values = torch.from_numpy(x)
    zero_point: Tensor = quantizer.zero_point.to(quantizer.dtype).reshape(())
    found = quantize_dequantize(values, quantizer.scale.reshape(()), zero_point).numpy()
    assert agrees(found, quantizer(values).numpy(), x, quantizer.scale.numpy(), zero_point.numpy())


@pytest.mark.parametrize("fields", [{"bits": 16}, {"axis": 1, "group_size": 4}, {"per_token": True}])
def test_what_it_cannot_simulate_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"2 to 8 bits, per tensor or per channel; got .*quantize\.uniform"):
        FakeQuantize(QuantScheme(**fields))
