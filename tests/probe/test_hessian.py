from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import checked, damped_cholesky, damped_inverse, inverse_upper, output_error
from zoo import normal, relative


def inputs(columns: int, rows: int, seed: int = 0) -> Tensor:
    """Correlated inputs, `[K, N]`."""
    return normal(columns, columns, seed=seed) @ normal(columns, rows, seed=seed + 1) / columns**0.5


def test_the_upper_factor_is_that_of_the_inverse() -> None:
    x = inputs(7, 40).double()
    gram = x @ x.T / 40
    upper = inverse_upper(gram)
    assert torch.equal(upper, upper.triu())
    assert relative(upper.T @ upper, damped_inverse(gram)) < 1e-10
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(7).double()
    assert relative(damped_inverse(gram), torch.linalg.inv(damped)) < 1e-10
    stacked = damped_inverse(torch.stack([gram, torch.zeros_like(gram)]))
    assert relative(stacked[0], damped_inverse(gram)) < 1e-12
    assert bool(torch.isfinite(stacked).all())


def test_the_error_is_that_of_the_outputs() -> None:
    before, after, x = normal(3, 7).double(), normal(3, 7, seed=5).double(), inputs(7, 40).double()
    expected = float(((before - after) @ x).square().sum() / 40)
    assert output_error(before, after, x @ x.T / 40) == pytest.approx(expected, rel=1e-12)


def test_dead_inputs_touch_no_other_column() -> None:
    gram = torch.eye(4, dtype=torch.float64) + 0.5
    gram[2], gram[:, 2] = 0, 0
    live = [0, 1, 3]
    assert relative(damped_inverse(gram, 0)[live][:, live], torch.linalg.inv(gram[live][:, live])) < 1e-12
    assert damped_inverse(gram, 0)[2, live].abs().max() == 0
    assert damped_inverse(gram, 0)[2, 2] > 1e10


def test_what_cannot_be_worked_with_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="Gram"):
        damped_cholesky(torch.full((3, 3), torch.nan))
    with pytest.raises(ConfigError, match="flatten"):
        checked(normal(3, 4), torch.eye(3))


def test_the_working_copy_is_at_least_float32() -> None:
    weight = normal(3, 4).bfloat16()
    assert checked(weight, torch.eye(4)).dtype == torch.float32
    assert checked(weight, torch.eye(4).double()).dtype == torch.float64
    same = normal(3, 4)
    assert checked(same, torch.eye(4)).data_ptr() != same.data_ptr()
