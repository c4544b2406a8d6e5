from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_problems import AFFINE, SYMMETRIC, gram_of, inputs

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import output_error
from tersor.quantize.rounding import SoftRounding, WeightGrid, adaround, beta_at
from zoo import normal, relative


def soft_of(rows: int = 4, columns: int = 6) -> SoftRounding:
    weight = normal(rows, columns)
    scale, zero_point = WeightGrid.fitted(weight, SYMMETRIC).expanded(columns)
    return SoftRounding(weight, SYMMETRIC, scale=scale, zero_point=zero_point)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(3, 8), (3, 2, 3, 3), (5,), (1, 1), (2, 4, 3)]),
    scheme=st.sampled_from([SYMMETRIC, AFFINE, QuantScheme(bits=8, signed=True, symmetric=True)]),
    power=st.integers(-60, 60),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_starts_as_the_weight(
    shape: tuple[int, ...], scheme: QuantScheme, power: int, double: bool, seed: int
) -> None:
    """Per channel over a weight of any shape; soft values are the weight, hard ones the nearest points."""
    weight = normal(*shape, seed=seed) * 2.0**power
    weight = weight.double() if double else weight
    grid = WeightGrid.fitted(weight.reshape(shape[0], -1), scheme)
    over = (shape[0], *(1,) * (len(shape) - 1))
    soft = SoftRounding(weight, scheme, scale=grid.scale.reshape(over), zero_point=grid.zero_point.reshape(over))
    assert soft.V.shape == shape
    step = grid.scale.reshape(over)
    inside = (weight >= (scheme.qmin - soft.zero_point) * step) & (weight <= (scheme.qmax - soft.zero_point) * step)
    assert bool((((soft().detach() - weight) / step)[inside].abs() < 1e-4).all())
    clear = (soft.share() - 0.5).abs() > 1e-4
    assert torch.equal(soft.hard()[clear], grid.nearest(weight.reshape(shape[0], -1)).reshape(shape)[clear])
    assert soft().dtype == soft.hard().dtype == weight.dtype


def test_up_and_down_are_the_two_neighbours() -> None:
    soft, weight = soft_of(), normal(4, 6)
    down, up = (soft.scale * (weight / soft.scale).floor(), soft.scale * (weight / soft.scale).floor() + soft.scale)
    with torch.no_grad():
        soft.V.fill_(-10)
        assert torch.allclose(soft.hard(), down, atol=1e-6)
        assert torch.equal(soft(), soft.hard())
        assert float(soft.regularisation(2.0)) == 0
        soft.V.fill_(10)
        top = SYMMETRIC.qmax * soft.scale
        assert torch.allclose(soft.hard(), torch.minimum(up, top), atol=1e-6)
        assert torch.equal(soft(), soft.hard())
        assert float(soft.regularisation(20.0)) == 0


def test_the_regularisation_is_that_of_the_paper() -> None:
    soft = soft_of(2, 3)
    with torch.no_grad():
        soft.V.copy_(torch.tensor([[0.0, 1.0, -1.0], [0.5, -8.0, 8.0]]))
    share = (soft.V.detach().sigmoid() * 1.2 - 0.1).clamp(0, 1)
    for beta in (2.0, 7.5, 20.0):
        expected = sum(1 - abs(2 * float(one) - 1) ** beta for one in share.flatten())
        assert soft.regularisation(beta).item() == pytest.approx(expected, rel=1e-5)
    soft.regularisation(2.0).backward()
    assert soft.V.grad is not None
    assert soft.V.grad[0, 1] < 0 < soft.V.grad[0, 2]  # descending moves them away from the middle
    assert soft.V.grad[1, 1] == soft.V.grad[1, 2] == 0


def test_weights_that_saturate_stay_on_the_grid() -> None:
    scale, zero_point = torch.full((1,), 0.1), torch.full((1,), 3.0)
    weight = torch.tensor([-9.0, 9.0, 0.12])
    soft = SoftRounding(weight, AFFINE, scale=scale, zero_point=zero_point)
    assert soft().tolist() == pytest.approx([-0.3, 0.4, 0.12])
    assert soft.hard().tolist() == pytest.approx([-0.3, 0.4, 0.1])
    with torch.no_grad():
        soft.V.fill_(10)
    assert soft.hard().tolist() == pytest.approx([-0.2, 0.4, 0.2])


def test_gradients_reach_every_choice() -> None:
    soft = soft_of()
    soft().sum().backward()
    assert soft.V.grad is not None
    assert int((soft.V.grad > 0).sum()) >= 20  # all but those at the end of the codes
    assert [name for name, _ in soft.named_parameters()] == ["V"]
    assert set(soft.state_dict()) == {"V", "scale", "zero_point", "floor"}


def test_soft_rounding_refuses_what_is_no_grid() -> None:
    weight, one = normal(3, 4), torch.ones(3, 1)
    for scale in (torch.ones(4, 1), torch.ones(1, 3, 4), -one, torch.ones(2, 4)):
        with pytest.raises(ConfigError):
            SoftRounding(weight, SYMMETRIC, scale=scale, zero_point=torch.zeros(1))
    for zero_point in (one, torch.zeros(3)):
        with pytest.raises(ConfigError):
            SoftRounding(weight, SYMMETRIC, scale=one, zero_point=zero_point)
    for broken in (weight * torch.nan, weight / 0):
        with pytest.raises(NonFiniteError):
            SoftRounding(broken, SYMMETRIC, scale=one, zero_point=torch.zeros(1))
    with pytest.raises(NonFiniteError):
        SoftRounding(weight, SYMMETRIC, scale=one * torch.nan, zero_point=torch.zeros(1))


@pytest.mark.parametrize("total", [10, 1000])
def test_beta_falls_from_20_to_2(total: int) -> None:
    betas = [beta_at(step, total) for step in range(total + 1)]
    warm = total // 5
    assert betas[:warm] == [None] * warm
    rest = [beta for beta in betas if beta is not None]
    assert len(rest) == total + 1 - warm
    assert rest[0] == 20
    assert rest[-1] == pytest.approx(2)
    assert rest == sorted(rest, reverse=True)
    assert beta_at(warm + (total - warm) // 2, total) == pytest.approx(11)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_outputs_err_much_less_than_with_the_nearest(bits: int) -> None:
    scheme = QuantScheme(bits=bits, signed=True, symmetric=True)
    for seed in range(2):
        weight, x = normal(12, 24, seed=seed), inputs(24, 200, seed)
        grid = WeightGrid.fitted(weight, scheme, 2)
        found = adaround(weight, x, grid, steps=300, batch=64)
        error = output_error(weight, found, gram_of(x))
        assert error < 0.8 * output_error(weight, grid.nearest(weight), gram_of(x))
        step = grid.expanded(24)[0]
        assert float(((found - weight) / step).abs().max()) < 1.001  # up or down, no further


def test_it_is_near_the_best_of_all_choices() -> None:
    ratios, nearest = [], []
    for seed in range(6):
        weight, x = normal(1, 5, seed=seed), inputs(5, 60, seed)
        grid = WeightGrid.fitted(weight, SYMMETRIC)
        scale, _ = grid.expanded(5)
        choices = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
        points = ((weight / scale).floor() + choices).clamp(SYMMETRIC.qmin, SYMMETRIC.qmax) * scale
        least = min(output_error(weight, point[None], gram_of(x)) for point in points)
        ratios.append(output_error(weight, adaround(weight, x, grid, steps=250), gram_of(x)) / least)
        nearest.append(output_error(weight, grid.nearest(weight), gram_of(x)) / least)
    assert min(ratios) > 1 - 1e-4
    assert sum(ratio < 1 + 1e-4 for ratio in ratios) >= 4
    assert sum(ratios) < 0.8 * sum(nearest)


def test_targets_may_be_others_than_its_own_outputs() -> None:
    """A layer behind quantized ones sees disturbed inputs, and shall answer as if they were not."""
    weight, clean = normal(8, 12), inputs(12, 300)
    seen = clean + 0.6 * normal(300, 12, seed=7)
    targets = clean @ weight.T
    grid = WeightGrid.fitted(weight, QuantScheme(bits=4, signed=True, symmetric=True))

    def error(found: torch.Tensor) -> float:
        return float((seen @ found.T - targets).square().sum())

    found = adaround(weight, seen, grid, targets=targets, steps=250)
    assert error(found) < 0.95 * error(adaround(weight, seen, grid, steps=250))
    assert error(found) < error(grid.nearest(weight))
    same = adaround(weight, clean, grid, targets=targets, steps=100)
    assert relative(clean @ same.T, targets) < relative(clean @ grid.nearest(weight).T, targets)


def test_the_seed_alone_decides() -> None:
    weight, x = normal(8, 16), inputs(16, 200)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    state = torch.random.get_rng_state()
    expected = adaround(weight, x, grid, steps=60, batch=16, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    with torch.no_grad():
        assert torch.equal(adaround(weight, x, grid, steps=60, batch=16, seed=3), expected)
    torch.random.set_rng_state(state)
    assert not torch.equal(adaround(weight, x, grid, steps=60, batch=16, seed=4), expected)
    whole = [adaround(weight, x, grid, steps=60, batch=200, seed=seed) for seed in (3, 4)]
    assert torch.equal(*whole)


def test_without_steps_it_is_the_nearest() -> None:
    weight = normal(4, 8)
    grid = WeightGrid.fitted(weight, AFFINE)
    assert torch.equal(adaround(weight, inputs(8, 40), grid, steps=0), grid.nearest(weight))


def test_wrong_settings_are_refused() -> None:
    weight, x = normal(4, 8), inputs(8, 40)
    grid = WeightGrid.fitted(weight, SYMMETRIC)
    for settings_ in ({"steps": -1}, {"batch": 0}):
        with pytest.raises(ConfigError, match="steps"):
            adaround(weight, x, grid, **settings_)
    for targets in (normal(40, 5), normal(39, 4), normal(40)):
        with pytest.raises(ConfigError, match="targets"):
            adaround(weight, x, grid, targets=targets)
    with pytest.raises(ConfigError, match="inputs"):
        adaround(weight, x[:0], grid)
    with pytest.raises(NonFiniteError, match="targets"):
        adaround(weight, x, grid, targets=torch.full((40, 4), torch.nan))
