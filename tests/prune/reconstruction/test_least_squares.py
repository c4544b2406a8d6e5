from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import inverse_upper, output_error
from tersor.prune.reconstruction import refit
from zoo import normal, relative


def inputs(columns: int, rows: int, seed: int = 0) -> Tensor:
    """Correlated inputs, `[K, N]`."""
    return normal(columns, columns, seed=seed) @ normal(columns, rows, seed=seed + 1) / columns**0.5


def spread(weight: Tensor, kept: list[int], columns: int) -> Tensor:
    full = torch.zeros(len(weight), columns, dtype=weight.dtype)
    full[:, kept] = weight
    return full


@pytest.mark.parametrize("kept", [[0, 2, 3, 7], [5], [7, 1, 0, 2, 3, 4, 5]])
def test_undamped_it_is_the_least_squares_fit(kept: list[int]) -> None:
    weight, x = normal(5, 8).double(), inputs(8, 60).double()
    expected = torch.linalg.lstsq(x[kept].T, (weight @ x).T).solution.T
    assert relative(refit(weight, x @ x.T / 60, kept, damping=0), expected) < 1e-10
    assert relative(refit(weight, x @ x.T / 60, torch.tensor(kept), damping=1e-9), expected) < 1e-6


@settings(max_examples=80, deadline=None)
@given(
    columns=st.integers(2, 12),
    rows=st.integers(1, 30),
    seed=st.integers(0, 100),
    damping=st.floats(1e-4, 1),
    data=st.data(),
)
def test_it_is_never_worse_than_leaving_the_rest_alone(
    columns: int, rows: int, seed: int, damping: float, data: st.DataObject
) -> None:
    """Also with fewer rows than columns, where the Gram matrix is singular."""
    kept = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, unique=True))
    weight, x = normal(4, columns, seed=seed + 2), inputs(columns, rows, seed)
    gram = x @ x.T / rows
    found = refit(weight, gram, kept, damping)
    assert found.shape == (4, len(kept))
    before = output_error(weight, spread(weight[:, kept], kept, columns), gram)
    assert output_error(weight, spread(found, kept, columns), gram) <= before * (1 + 1e-4) + 1e-9


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, x = normal(5, 8), inputs(8, 60)
    gram = x @ x.T
    for scale in (1e-20, 1e-6, 1e6, 1e20):
        assert relative(refit(weight, gram * scale, [0, 1, 2, 3]), refit(weight, gram, [0, 1, 2, 3])) < 1e-4


def test_a_column_that_another_repeats_is_replaced_by_it() -> None:
    x = inputs(4, 50).double()
    x[3] = 2 * x[1]
    weight = normal(3, 4).double()
    found = refit(weight, x @ x.T / 50, [0, 1, 2], damping=1e-9)
    assert relative(found[:, 1], weight[:, 1] + 2 * weight[:, 3]) < 1e-6


def test_ends_and_types() -> None:
    weight, gram = normal(3, 4).bfloat16(), torch.eye(4)
    assert refit(weight, gram, []).shape == (3, 0)
    assert torch.equal(refit(weight, gram, [2, 0, 1, 3]), weight[:, [2, 0, 1, 3]])
    assert refit(weight, gram, [0, 1]).dtype == torch.bfloat16


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_and_singular_gram_matrices_give_numbers(damping: float) -> None:
    weight = normal(3, 6)
    repeated = torch.ones(6, 6)
    dead = torch.eye(6)
    dead[1, 1] = 0
    for gram in (torch.zeros(6, 6), repeated, dead, 1e-38 * torch.eye(6), 1e37 * repeated):
        assert bool(torch.isfinite(refit(weight, gram, [0, 1, 2], damping)).all())
        upper = inverse_upper(gram, max(damping, 1e-3))
        assert bool((upper.diagonal() > 0).all()) or not bool(torch.isfinite(upper).all())
    with pytest.raises(NonFiniteError):
        refit(weight, torch.full((6, 6), torch.nan), [0, 1])


@pytest.mark.parametrize("kept", [[0, 0], [4], [-1], [[0, 1]]])
def test_wrong_columns_are_refused(kept: list[int]) -> None:
    with pytest.raises(ConfigError, match="kept"):
        refit(normal(3, 4), torch.eye(4), kept)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="gram"):
        refit(normal(3, 4), torch.eye(5), [0])
    with pytest.raises(ConfigError, match="flatten"):
        refit(normal(3, 4, 1, 1), torch.eye(4), [0])
