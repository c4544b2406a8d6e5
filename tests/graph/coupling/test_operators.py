"""Operators that couple entries in a way of their own: exactly which indices go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from specimens.constructs_joins import Constructed
from tersor.graph import Coupling, Place, couple


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def units(coupling: Coupling, name: str, dim: int) -> list[list[int]]:
    """Indices of each unit at a place; empty if it is frozen."""
    place = Place(name, dim)
    rows = [family.members[place] for family in coupling.families if place in family.members]
    return sorted(row.tolist() for part in rows for row in part)


def reasons(coupling: Coupling) -> str:
    return "; ".join(item.reason for item in coupling.frozen)


def between(run: Callable[[Tensor], Tensor], width: int = 4) -> Coupling:
    """What becomes of the outputs of a layer, `[2, 6, width]`, in front of another one that sees the same width."""
    net = Constructed(lambda m, x: m.b(run(m.a(x))), a=linear(3, width), b=linear(width, 2))
    return couple(net, torch.randn(2, 6, 3))


SINGLE = [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: functional.avg_pool2d(x[:, None], (2, 1))[:, 0],
        lambda x: functional.max_pool2d(x[:, None], (3, 1), (2, 1), (1, 0))[:, 0],
        lambda x: x.contiguous().as_strided((2, 2, 4, x.shape[2]), (24, 8, 4, 1)).amax(2),
        lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), 6, dim=1),
        lambda x: x.clone().abs_(),
        lambda x: torch.floor_divide(x, 0.1),
        lambda x: torch.diagonal(x[:, :2], 0, 0, 1).transpose(0, 1) + x[:, :2].sum(1),
    ],
)
def test_features_that_stay_apart_go_one_by_one(run: Callable[[Tensor], Tensor]) -> None:
    assert units(between(run), "a.weight", 0) == SINGLE


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: functional.avg_pool2d(x[:, None], (1, 3), 1, (0, 1))[:, 0], "it is a spatial dimension"),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x), 4), "a Fourier transform runs along it"),
        (lambda x: x[:, :4].triu(2) + x[:, :4], "its positions are compared"),
        (lambda x: torch.diagonal(x[:, :4], 1, 1, 2)[:, :1, None] + x, "one of its diagonals is taken"),
    ],
)
def test_features_that_depend_on_each_other_stay(run: Callable[[Tensor], Tensor], reason: str) -> None:
    found = between(run)
    assert units(found, "a.weight", 0) == []
    assert reason in reasons(found)


def test_complex_numbers_of_two_features_go_in_pairs() -> None:
    def run(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 6, -1, 2))
        return torch.view_as_real(pairs * 1j).flatten(-2)

    assert units(between(run), "a.weight", 0) == [[0, 1], [2, 3]]


def test_a_triangle_of_a_square_weight_takes_the_same_of_rows_and_columns() -> None:
    net = Constructed(
        lambda m, x: m.b(functional.linear(m.a(x), m.square.tril(-1))),
        a=linear(3, 4), square=nn.Parameter(torch.randn(4, 4)), b=linear(4, 2),
    )  # fmt: skip
    found = couple(net, torch.randn(5, 3))
    assert units(found, "a.weight", 0) == units(found, "square", 0) == units(found, "square", 1) == SINGLE
    assert len(found.families) == 1


def test_a_weight_norm_lets_inputs_and_outputs_go() -> None:
    net = Constructed(lambda m, x: m.c(m.b(m.a(x))), a=linear(3, 4), b=weight_norm(linear(4, 5)), c=linear(5, 2))
    found = couple(net, torch.randn(5, 3))
    assert units(found, "b.parametrizations.weight.original1", 1) == SINGLE
    assert units(found, "b.parametrizations.weight.original0", 0) == [[0], [1], [2], [3], [4]]


def test_bilinear_and_distances_contract_both_sides() -> None:
    net = Constructed(
        lambda m, x: m.last(torch.cdist(m.joined(m.a(x), m.b(x)), m.centres)),
        a=linear(3, 2), b=linear(3, 4), joined=nn.Bilinear(2, 4, 5), centres=nn.Parameter(torch.randn(6, 5)),
        last=linear(6, 2),
    )  # fmt: skip
    found = couple(net, torch.randn(5, 3))
    assert units(found, "joined.weight", 1) == units(found, "a.weight", 0) == [[0], [1]]
    assert units(found, "joined.weight", 2) == units(found, "b.weight", 0) == SINGLE
    assert units(found, "joined.weight", 0) == units(found, "centres", 1) == [[0], [1], [2], [3], [4]]
    assert units(found, "centres", 0) == units(found, "last.weight", 1) == [[index] for index in range(6)]


def test_columns_of_a_bag_go() -> None:
    net = Constructed(lambda m, x: m.last(m.bag(x)), bag=nn.EmbeddingBag(7, 4), last=linear(4, 2))
    found = couple(net, torch.randint(0, 7, (3, 5)))
    assert units(found, "bag.weight", 1) == units(found, "last.weight", 1) == SINGLE
    assert units(found, "bag.weight", 0) == []


@pytest.mark.parametrize("operator", ["scatter_reduce", "scatter_add"])
def test_what_is_scattered_goes_with_the_places(operator: str) -> None:
    def run(x: Tensor) -> Tensor:
        place = torch.tensor([0, 1, 1, 0, 3, 2])[None, :, None].expand_as(x)
        if operator == "scatter_add":
            return torch.zeros_like(x).scatter_add(1, place, x)
        return torch.zeros_like(x).scatter_reduce(1, place, x, "amax", include_self=False)

    assert units(between(run), "a.weight", 0) == SINGLE


def test_a_native_shuffle_takes_the_same_of_every_group() -> None:
    net = Constructed(
        lambda m, x: m.b(functional.channel_shuffle(m.a(x), 2)), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1)
    )
    found = couple(net, torch.randn(2, 3, 4, 4))
    assert units(found, "a.weight", 0) == [[0, 3], [1, 4], [2, 5]]
    assert units(found, "b.weight", 1) == [[0, 1], [2, 3], [4, 5]]


def test_rows_that_take_the_place_of_others_go_column_by_column() -> None:
    def run(m: Any, words: Tensor, image: Tensor) -> Tensor:
        x = m.words(words)
        return m.last(x.masked_scatter((words == 1)[..., None].expand_as(x), m.image(image)))

    net = Constructed(run, words=nn.Embedding(5, 4), image=linear(3, 4), last=linear(4, 2))
    found = couple(net, (torch.tensor([[1, 1, 2], [1, 1, 4]]), torch.randn(2, 2, 3)))
    assert units(found, "words.weight", 1) == units(found, "image.weight", 0) == SINGLE


def test_a_weight_that_is_standardised_may_lose_inputs() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        weight = functional.batch_norm(m.b.weight.reshape(1, m.b.out_channels, -1), None, None, training=True)
        return m.c(functional.conv2d(m.a(x), weight.reshape_as(m.b.weight)))

    net = Constructed(run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(5, 2, 1))
    found = couple(net, torch.randn(2, 3, 4, 4))
    assert units(found, "b.weight", 1) == SINGLE
    assert units(found, "b.weight", 0) == [[0], [1], [2], [3], [4]]


def test_grouped_products_take_runs_that_keep_rows_aligned() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 6], dtype=torch.int32)
        return m.last(torch._grouped_mm(m.first(x), m.experts.transpose(1, 2), offs=ends))

    net = Constructed(run, first=linear(3, 16), experts=nn.Parameter(torch.randn(2, 24, 16)), last=linear(24, 2))
    found = couple(net, torch.randn(6, 3))
    assert units(found, "first.weight", 0) == units(found, "experts", 2) == [list(range(8)), list(range(8, 16))]
    assert units(found, "experts", 1) == [[index] for index in range(24)]
    assert units(found, "experts", 0) == []
