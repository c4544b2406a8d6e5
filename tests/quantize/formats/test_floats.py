from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.errors import ConfigError
from tersor.quantize import bfloat16, float8, float16
from zoo import normal

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
arrays = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-400, 400, width=32))


@settings(max_examples=50, deadline=None)
@given(arrays, st.sampled_from(sorted(DTYPES)))
def test_unscaled_it_is_the_cast_of_pytorch(array: np.ndarray[Any, Any], kind: Any) -> None:
    tensor, found = torch.from_numpy(array), float8(torch.from_numpy(array), kind, scaled=False)
    assert torch.equal(found.codes.view(DTYPES[kind]).float(), tensor.to(DTYPES[kind]).float())
    assert torch.equal(found.dequantize(), tensor.to(DTYPES[kind]).float())
    assert torch.equal(float16(tensor).dequantize(), tensor.half().float())
    assert torch.equal(bfloat16(tensor).dequantize(), tensor.bfloat16().float())


@pytest.mark.parametrize(("kind", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_it_saturates_and_scales_to_the_largest(kind: Any, largest: float) -> None:
    tensor = torch.tensor([1e9, -1e9, 1.0])
    assert float8(tensor, kind, scaled=False).dequantize().tolist() == [largest, -largest, 1.0]
    found = float8(torch.tensor([3.0, -0.5]), kind)
    assert found.scale is not None
    assert float(found.scale) == pytest.approx(3.0 / largest)
    assert found.codes.view(DTYPES[kind]).float().tolist()[0] == largest
    assert float16(tensor).dequantize().tolist() == [65504.0, -65504.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(arrays, st.sampled_from([("e4m3", 3, -9), ("e5m2", 2, -16)]))
def test_errors_are_at_most_half_a_mantissa_bit(array: np.ndarray[Any, Any], form: tuple[Any, int, int]) -> None:
    kind, mantissa, smallest = form
    tensor, found = torch.from_numpy(array), float8(torch.from_numpy(array), kind)
    assert found.scale is not None
    error = (found.dequantize() - tensor).abs()
    bound = tensor.abs() * 2.0 ** -(mantissa + 1) + found.scale * 2.0 ** (smallest - 1)
    assert bool((error <= bound * 1.001).all())


def test_channels_of_different_size_profit_from_their_own_scale() -> None:
    tensor = normal(8, 64) * 10.0 ** torch.arange(-6, 2)[:, None]
    small = tensor[0]
    one, many = float8(tensor).dequantize()[0], float8(tensor, granularity="channel").dequantize()[0]
    assert float((many - small).norm() / small.norm()) < 0.05
    assert float((one - small).norm() / small.norm()) > 0.5


def test_an_unknown_kind_is_told() -> None:
    with pytest.raises(ConfigError, match=r"expected one of \['e4m3', 'e5m2'\], got 'e3m4'"):
        float8(normal(3), "e3m4")  # type: ignore[arg-type]
