from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import ConfigError
from tersor.probe.hessian import damped_inverse, output_error
from tersor.prune.reconstruction import obc, refit, sparsegpt
from zoo import normal, relative

METHODS = {"obc": obc.prune, "sparsegpt": sparsegpt.prune}
NAMES = sorted(METHODS)


def gram_of(columns: int, rows: int = 0, seed: int = 0) -> Tensor:
    x = normal(columns, columns, seed=seed) @ normal(columns, rows or 4 * columns, seed=seed + 1) / columns**0.5
    return x @ x.T / x.shape[1]


def by_magnitude(weight: Tensor, sparsity: float) -> Tensor:
    found = weight.clone()
    found.view(-1)[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = 0
    return found


def by_magnitude_n_m(weight: Tensor, n: int, m: int) -> Tensor:
    groups = weight.reshape(-1, m)
    keep = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, 1).indices, 1)
    return (groups * keep).reshape(weight.shape)


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [("obc", 0.3), ("obc", 0.5), ("obc", 0.8), ("sparsegpt", 0.3), ("sparsegpt", 0.5)],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_below_that_of_magnitude(name: str, sparsity: float, seed: int) -> None:
    weight, gram = normal(24, 48, seed=seed + 5), gram_of(48, seed=seed)
    pruned, _ = METHODS[name](weight, gram, sparsity)
    assert output_error(weight, pruned, gram) < output_error(weight, by_magnitude(weight, sparsity), gram)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_m", [(2, 4), (1, 4), (4, 8), (3, 3), (1, 1)])
def test_the_pattern_is_exact_and_better_than_magnitude(name: str, n_m: tuple[int, int]) -> None:
    weight, gram = normal(10, 48, seed=5), gram_of(48)
    pruned, mask = METHODS[name](weight, gram, n_m=n_m)
    assert bool((mask.reshape(10, -1, n_m[1]).sum(2) == n_m[0]).all())
    assert torch.equal(pruned != 0, mask)
    plain = output_error(weight, by_magnitude_n_m(weight, *n_m), gram)
    assert output_error(weight, pruned, gram) <= plain
    if n_m[0] == n_m[1]:
        assert torch.equal(pruned, weight)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 150)),
    rows=st.integers(1, 40),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 50),
)
def test_the_share_of_zeros_is_exact(name: str, shape: tuple[int, int], rows: int, sparsity: float, seed: int) -> None:
    """Also with fewer rows than columns, where the Gram matrix is singular."""
    weight, gram = normal(*shape, seed=seed), gram_of(shape[1], rows, seed)
    before = weight.clone()
    pruned, mask = METHODS[name](weight, gram, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    assert bool((pruned[~mask] == 0).all())
    assert bool(torch.isfinite(pruned).all())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_obc_leaves_the_least_squares_fit_of_what_is_kept(sparsity: float) -> None:
    """Removing one by one with repairs equals removing all at once and refitting."""
    weight, gram = normal(8, 20).double(), gram_of(20).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20).double()
    pruned, mask = obc.prune(weight, gram, sparsity)
    assert len(set(mask.sum(1).tolist())) > 1  # rows differ: the cheapest of the layer go
    for row in range(8):
        kept = mask[row].nonzero().flatten()
        assert relative(pruned[row, kept], refit(weight[row : row + 1], damped, kept, damping=0)[0]) < 1e-9


def test_obc_takes_the_same_steps_as_the_textbook() -> None:
    weight, gram = normal(1, 10).double(), gram_of(10).double()
    row, inverse, kept = weight[0].clone(), damped_inverse(gram), torch.ones(10, dtype=torch.bool)
    for removed in range(1, 9):
        scores = torch.where(kept, row.square() / inverse.diagonal(), torch.inf)
        worst = int(scores.argmin())
        row = row - row[worst] / inverse[worst, worst] * inverse[worst]
        inverse = inverse - torch.outer(inverse[:, worst], inverse[worst]) / inverse[worst, worst]
        kept[worst] = False
        row[~kept], inverse[~kept], inverse[:, ~kept] = 0, 0, 0
        inverse.diagonal()[~kept] = 1
        pruned, mask = obc.prune(weight, gram, removed / 10)
        assert torch.equal(mask[0], kept)
        assert relative(pruned[0], row) < 1e-9


def test_obc_is_the_best_single_removal_of_all() -> None:
    weight, gram = normal(2, 4).double(), gram_of(4).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(4).double()
    pruned, mask = obc.prune(weight, gram, 1 / 8)
    errors = []
    for row, column in itertools.product(range(2), range(4)):
        rest = [other for other in range(4) if other != column]
        tried = weight.clone()
        tried[row] = 0
        tried[row, rest] = refit(weight[row : row + 1], damped, rest, damping=0)[0]
        errors.append(output_error(weight, tried, damped))
    assert int((~mask).flatten().nonzero()) == int(torch.tensor(errors).argmin())
    assert output_error(weight, pruned, damped) == pytest.approx(min(errors))


def test_obc_does_not_depend_on_how_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(9, 16).double(), gram_of(16).double()
    expected = obc.prune(weight, gram, 0.5)
    monkeypatch.setattr(obc, "CHUNK", 300)
    found = obc.prune(weight, gram, 0.5)
    assert torch.equal(found[1], expected[1])
    assert relative(found[0], expected[0]) < 1e-9


def test_obc_looks_to_the_end_of_rows_that_lose_nearly_everything() -> None:
    weight, gram = normal(6, 12), gram_of(12)
    weight[:3] *= 1e-3
    _, mask = obc.prune(weight, gram, 0.5)
    assert not bool(mask[:3].any())
    assert bool(mask[3:].all())


def test_sparsegpt_blocks_are_only_a_matter_of_speed_for_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(6, 48).double(), gram_of(48).double()
    expected = sparsegpt.prune(weight, gram, n_m=(2, 4))
    monkeypatch.setattr(sparsegpt, "BLOCK", 10)
    found = sparsegpt.prune(weight, gram, n_m=(2, 4))
    assert torch.equal(found[1], expected[1])
    assert relative(found[0], expected[0]) < 1e-9


def test_sparsegpt_repairs_to_the_right_by_least_squares() -> None:
    """With only the first column lost, the others are the least-squares fit."""
    gram = gram_of(8).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(8).double()
    weight = normal(1, 8).double()
    weight[0, 0] = 1e-6
    pruned, mask = sparsegpt.prune(weight, gram, 1 / 8)
    assert mask[0].tolist() == [False] + [True] * 7
    assert relative(pruned[:, 1:], refit(weight, damped, list(range(1, 8)), damping=0)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_dead_and_singular_gram_matrices_give_numbers(name: str) -> None:
    weight = normal(4, 8)
    dead = gram_of(8)
    dead[3], dead[:, 3] = 0, 0
    for gram in (torch.zeros(8, 8), torch.ones(8, 8), dead):
        for settings_ in ({"sparsity": 0.5}, {"n_m": (2, 4)}, {"sparsity": 0.5, "damping": 0.0}):
            pruned, _ = METHODS[name](weight, gram, **settings_)  # type: ignore[arg-type]
            assert bool(torch.isfinite(pruned).all())
    _, mask = METHODS[name](weight, dead, 0.125)
    assert not bool(mask[:, 3].any())  # weights of a dead input go first


@pytest.mark.parametrize("name", NAMES)
def test_types_are_kept(name: str) -> None:
    pruned, _ = METHODS[name](normal(4, 8).bfloat16(), gram_of(8), 0.5)
    assert pruned.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings_",
    [{}, {"sparsity": 0.5, "n_m": (2, 4)}, {"sparsity": 1.0}, {"n_m": (0, 4)}, {"n_m": (5, 4)}, {"n_m": (2, 3)}],
)
def test_what_cannot_work_is_said(name: str, settings_: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        METHODS[name](normal(4, 8), gram_of(8), **settings_)
