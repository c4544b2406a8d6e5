from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.graph import FakeQuantize
from tersor.quantize.learned import LARGEST_GRADIENT, LearnedStep, Method
from tersor.quantize.widths import weight_scheme
from zoo import normal

METHODS: list[Method] = ["lsq", "lsq+", "pact"]


def learned(scheme: QuantScheme, scale: list[float], zero: list[int], method: Method, **fields: float) -> LearnedStep:
    quantizer = FakeQuantize(scheme)
    quantizer.scale, quantizer.zero_point = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    quantizer.enabled = True
    return LearnedStep(quantizer, method, **fields)


def gradients(step: LearnedStep, values: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Of the values and of the logarithm of the step."""
    values = values.clone().requires_grad_()
    step.zero_grad()
    (step(values) * upstream).sum().backward()
    assert values.grad is not None
    assert step.log_scale.grad is not None
    return values.grad, step.log_scale.grad


UNSIGNED = QuantScheme(bits=2)
# x / s = -0.6, 0, 0.7, 1.4, 3, 4.2 for s = 0.5: below, zero, two inside, the edge, above
VALUES = torch.tensor([[-0.3, 0.0, 0.35, 0.7, 1.5, 2.1]])
UPSTREAM = torch.tensor([[0.01, 0.02, 0.03, -0.04, 0.05, 0.06]])


def test_lsq_by_hand() -> None:
    step = learned(UNSIGNED, [0.5], [0], "lsq")
    assert torch.allclose(step(VALUES), torch.tensor([[0, 0, 0.5, 0.5, 1.5, 1.5]]), atol=1e-6)
    passed, found = gradients(step, VALUES, UPSTREAM)
    assert torch.allclose(passed, torch.tensor([[0, 0.02, 0.03, -0.04, 0.05, 0]]))
    by_step = 0.03 * (1 - 0.7) + -0.04 * (1 - 1.4) + 0.05 * (3 - 3) + 0.06 * 3 + 0.01 * 0
    assert float(found) == pytest.approx(by_step / 0.5 / math.sqrt(6 * 3), rel=1e-4)


def test_lsq_plus_by_hand() -> None:
    step = learned(UNSIGNED, [0.5], [1], "lsq+")  # the range is [-0.5, 1]
    passed, found = gradients(step, VALUES, UPSTREAM)
    assert torch.allclose(passed, torch.tensor([[0.01, 0.02, 0.03, -0.04, 0, 0]]))
    by_step = 0.01 * (-1 + 0.6) + 0.03 * (1 - 0.7) + -0.04 * (1 - 1.4) + (0.05 + 0.06) * 2
    factor = 1 / math.sqrt(6 * 3)
    assert float(found) == pytest.approx(factor * by_step / 0.5, rel=1e-4)
    assert isinstance(step.offset, torch.nn.Parameter)
    assert step.offset.grad is not None
    assert float(step.offset.grad) == pytest.approx(-factor * (0.05 + 0.06) / 0.5, rel=1e-4)
    assert not isinstance(learned(UNSIGNED, [0.5], [1], "lsq").offset, torch.nn.Parameter)
    assert not isinstance(learned(weight_scheme(4, 0, reduced=False), [0.5], [0], "lsq+").offset, torch.nn.Parameter)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_pact_by_hand(decay: float) -> None:
    step = learned(UNSIGNED, [0.5], [0], "pact", decay=decay)  # clips at 1.5
    passed, found = gradients(step, VALUES, UPSTREAM)
    assert torch.allclose(passed, torch.tensor([[0, 0.02, 0.03, -0.04, 0.05, 0]]))
    assert float(found) == pytest.approx(0.06 / 1.5 + decay, rel=1e-4)  # dL/da = 0.06, told in log a


def test_every_channel_learns_its_own_step() -> None:
    scheme = weight_scheme(2, 1, reduced=False)  # codes -2 to 1
    step = learned(scheme, [0.5, 2.0], [0, 0], "lsq")
    values = torch.tensor([[0.3, 1.0], [-2.0, -5.0], [0.0, 9.0]])
    upstream = torch.full((3, 2), 0.1)
    assert torch.allclose(step(values), torch.tensor([[0.5, 0.0], [-1.0, -4.0], [0, 2.0]]))
    passed, found = gradients(step, values, upstream)
    assert torch.allclose(passed, torch.tensor([[0.1, 0.1], [0, 0], [0.1, 0]]))
    factor = 1 / math.sqrt(3 * 1)
    assert float(found[0]) == pytest.approx(factor * 0.1 * ((1 - 0.6) - 2) / 0.5, rel=1e-4)
    assert float(found[1]) == pytest.approx(factor * 0.1 * ((0 - 0.5) - 2 + 1) / 2.0, rel=1e-4)


def by_autograd(values: Tensor, scale: Tensor, zero: int, scheme: QuantScheme) -> Tensor:
    """LSQ as its appendix writes it."""
    position = values / scale + zero
    inside = position.clamp(scheme.qmin, scheme.qmax)
    rounded = inside + (inside.round() - inside).detach()
    return (rounded - zero) * scale


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.floats(0.01, 10),
    st.integers(0, 10**6),
)
def test_it_is_what_autograd_makes_of_the_papers_formula(bits: int, signed: bool, scale: float, seed: int) -> None:
    scheme = QuantScheme(bits=bits, signed=signed, symmetric=signed)
    zero = 0 if signed else seed % (scheme.qmax + 1)
    step = learned(scheme, [scale], [zero], "lsq")
    values = normal(4, 30, seed=seed) * scale * 2 ** (bits - 1)
    upstream = normal(4, 30, seed=seed + 1) * 1e-3 * scale
    passed, found = gradients(step, values, upstream)
    copy, own = values.clone().requires_grad_(), step.scale.clone().requires_grad_()
    (by_autograd(copy, own, zero, scheme) * upstream).sum().backward()
    assert copy.grad is not None
    assert own.grad is not None
    assert torch.allclose(passed, copy.grad, rtol=1e-5, atol=0)
    expected = float(own.grad) / scale / math.sqrt(30 * scheme.qmax)
    assert float(found) == pytest.approx(min(max(expected, -1), 1), rel=0.02, abs=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.full((3, 4), 1e30), torch.full((3, 4), -1e30)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_gradients_stay_finite_and_bounded(method: Method, values: Tensor, scale: float) -> None:
    for scheme, zero in ((UNSIGNED, 0), (UNSIGNED, 3), (weight_scheme(8, 1, reduced=False), 0)):
        count = 1 if scheme.axis is None else 4
        step = learned(scheme, [scale] * count, [zero] * count, method)
        passed, found = gradients(step, values, torch.full((3, 4), 100.0))
        assert bool(torch.isfinite(passed).all())
        assert bool((found.abs() <= LARGEST_GRADIENT).all())


def test_an_empty_channel_starts_with_a_step_that_means_something() -> None:
    step = learned(weight_scheme(4, 0, reduced=False), [1e-9, 0.5], [0, 0], "lsq")
    assert step.scale.tolist() == pytest.approx([0.0025, 0.5], rel=1e-3)
    values = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert torch.equal(step(values)[0], torch.zeros(2))
    _, found = gradients(step, values, torch.ones(2, 2))
    assert float(found[0]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_it_rounds_as_the_fixed_quantizer_does(method: Method) -> None:
    quantizer = FakeQuantize(QuantScheme(bits=4))
    quantizer.set_range(torch.tensor([-0.7]), torch.tensor([3.1]))
    step = LearnedStep(quantizer, method)
    quantizer.scale = step.scale  # e^(log s) may differ in the last bit
    values = normal(50, 7)
    assert torch.equal(step(values), quantizer(values))
    again = step(values).detach().requires_grad_()
    step(again).sum().backward()
    assert again.grad is not None
    assert bool((again.grad == 1).all())  # what is rounded already is never outside


def test_narrowing_keeps_what_was_learned() -> None:
    wide, narrow = QuantScheme(bits=8), QuantScheme(bits=4)
    step = learned(wide, [0.1], [0], "lsq")
    with torch.no_grad():
        step.log_scale += math.log(2)  # learned
    step.narrow(narrow, torch.tensor([17.0]), torch.tensor([3]))
    assert float(step.scale) == pytest.approx(0.1 * 2 * 17, rel=1e-5)
    assert int(step.zero_point) == 3
    assert step(torch.tensor([[1e6]])).item() == pytest.approx((15 - 3) * 3.4, rel=1e-5)
    shifted = learned(wide, [0.1], [100], "lsq+")
    with torch.no_grad():
        shifted.offset += 20  # type: ignore[operator]
    shifted.narrow(narrow, torch.tensor([17.0]), torch.tensor([6]))
    assert int(shifted.zero_point) == round(120 * 15 / 255)
    assert "bits=4" in repr(shifted)
