"""Sizes that code computes, compares, remembers; layers that no run has reached; what only training reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens.constructs_joins import Constructed
from tersor.graph import Coupling, Place, couple
from tersor.graph.coupling.integers import Attribute, Extent, Shape, Traced, traced_attributes
from tersor.graph.coupling.labels import Ledger, disjoint


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def units(coupling: Coupling, name: str, dim: int) -> list[list[int]]:
    """Indices of each unit at a place; empty if it is frozen."""
    place = Place(name, dim)
    rows = [family.members[place] for family in coupling.families if place in family.members]
    return sorted(row.tolist() for part in rows for row in part)


HEADS, BATCH = Attribute("attention", "heads"), Extent(None)


def test_a_size_that_is_fixed_only_scales_an_attribute() -> None:
    heads, batch = Traced(4, HEADS), Traced(3, BATCH)
    for number in (heads * batch, batch * heads):
        assert (number, number.origin, number.scale) == (12, HEADS, 3)
    assert (heads * batch // batch).scale == 1
    assert (heads * Traced(5, Attribute("", "size"))).origin is None


def test_numbers_that_are_found_equal_are_told() -> None:
    told: list[tuple[Any, Any]] = []
    heads, size = Traced(4, HEADS), Traced(4, BATCH)
    Traced.witness = lambda left, right: told.append((left.origin, right.origin))
    try:
        assert heads == size
        assert Shape((size, 7)) == (heads, 7)
        assert (heads != size) is False
        assert heads == 4  # a number of the code: nobody insists on an attribute
        assert heads != Traced(5, BATCH)
        assert heads != "heads"
        assert len({heads, size, 4}) == 1
    finally:
        Traced.witness = None
    assert len(told) >= 3
    assert {frozenset(pair) for pair in told} == {frozenset((HEADS, BATCH))}


class Remembering(nn.Module):
    """A cache, and the length that it is for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.length = linear(3, 4), linear(4, 2), 5
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.length:
            self.length, self.shape, self._sizes = x.shape[1], x.shape, [x.shape[0], 1]
        return self.b(self.a(x))


def test_what_the_model_remembers_stays_as_plain_numbers() -> None:
    model = Remembering()
    couple(model, torch.randn(2, 7, 3))
    assert (model.length, model.shape, model._sizes) == (7, (2, 7, 3), [2, 1])
    assert {type(number) for number in (model.length, *model.shape, *model._sizes)} == {int}
    assert type(model.shape) is tuple
    with traced_attributes(model):
        assert type(model.length) is Traced
    assert type(model.length) is int
    assert model.length == 7


@pytest.mark.parametrize("wanted", ["raise", "compare"])
def test_a_width_that_must_equal_an_attribute_takes_it_along(wanted: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if wanted == "raise" and x.shape[-1] != m.width:
            raise ValueError("wrong width")
        if wanted == "compare" and x.size() != (x.shape[0], m.width):
            raise ValueError("wrong width")
        return m.b(x)

    found = couple(Constructed(run, a=linear(3, 4), b=linear(4, 2), width=4), torch.randn(5, 3))
    assert units(found, "a.weight", 0) == [[0], [1], [2], [3]]
    assert {demand.attribute for demand in found.demands} == {Attribute("", "width")}


def test_heads_folded_into_the_batch_are_counted() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        batch, steps, _ = x.shape
        x = x.view(batch, steps, -1, 3).transpose(1, 2).reshape(batch * m.heads, steps, 3).softmax(-1)
        return m.b(x.view(batch, m.heads, steps, 3).transpose(1, 2).reshape(batch, steps, -1))

    found = couple(Constructed(run, a=linear(3, 12), b=linear(12, 2), heads=4), torch.randn(2, 5, 3))
    family = found["a.weight[0]"]
    assert units(found, "a.weight", 0) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert found.attributes_without(found.classes_of(family, torch.tensor([0, 2]))) == {Attribute("", "heads"): 2}


def test_what_is_expanded_to_a_number_of_heads_goes_with_them() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        own = m.a(x).view(*x.shape[:2], -1, 3)
        shared = m.shared(x)[:, :, None].expand(*own.shape[:-1], -1)
        return m.b(torch.cat([own, shared], -1).flatten(2))

    net = Constructed(run, a=linear(3, 12), shared=linear(3, 2), b=linear(20, 2))
    found = couple(net, torch.randn(2, 5, 3))
    assert units(found, "a.weight", 0) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert units(found, "b.weight", 1)[0] == [0, 1, 2, 3, 4]


def test_of_two_dimensions_that_merge_the_first_of_the_parameter_stays() -> None:
    ledger = Ledger()
    first, second = ledger.fresh(2), ledger.fresh(3)
    rows, columns = first.repeat_interleave(3), second.repeat(2)
    for blocks in ([rows, columns], [columns, rows]):
        (kept,) = disjoint(ledger, blocks, learned=10)
        assert torch.equal(kept, rows)


def test_a_new_tensor_gives_way_to_what_meets_a_parameter() -> None:
    ledger = Ledger()
    parameter, new, linked = ledger.fresh(2), ledger.fresh(6), ledger.fresh(6)
    ledger.unite(linked.reshape(2, 3), parameter[:, None])
    (kept,) = disjoint(ledger, [new, linked], learned=3)
    assert torch.equal(kept, linked)


def test_groups_of_a_convolution_go_whole_where_whole_heads_go() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.groups(m.a(x).transpose(1, 2)).transpose(1, 2)
        return m.b(x.unflatten(-1, (-1, m.size)).softmax(-1).flatten(-2))

    net = Constructed(run, a=linear(3, 12), groups=nn.Conv1d(12, 12, 3, padding=1, groups=3), b=linear(12, 2), size=4)
    found = couple(net, torch.randn(2, 5, 3))
    assert units(found, "groups.weight", 0) == units(found, "a.weight", 0) == [[*range(i, i + 4)] for i in (0, 4, 8)]
    family = found["a.weight[0]"]
    assert found.attributes_without(found.classes_of(family, torch.tensor([1]))) == {Attribute("groups", "groups"): 2}


def test_experts_in_a_dictionary_follow_one_that_was_reached() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.down["expert_1"](m.up["expert_1"](x).relu())

    up = nn.ModuleDict({f"expert_{i}": linear(3, 4) for i in range(3)})
    down = nn.ModuleDict({f"expert_{i}": linear(4, 2) for i in range(3)})
    (family,) = couple(Constructed(run, up=up, down=down), torch.randn(5, 3)).families
    assert {place.parameter for place in family.members} == {
        f"{part}.expert_{i}.weight" for part in ("up", "down") for i in range(3)
    }


def test_what_only_training_reads_goes_along() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if m.training:
            x = torch.where(torch.rand(len(x), 1) < 0.5, m.mask, x)
        return m.b(x)

    net = Constructed(run, a=linear(3, 4), mask=nn.Parameter(torch.randn(4)), b=linear(4, 2)).eval()
    state = torch.random.get_rng_state()
    found = couple(net, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert units(found, "mask", 0) == [[0], [1], [2], [3]]
    assert found.unused == ()
    assert not net.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failure_in_training_is_none_of_pruning() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise RuntimeError("not here")
        return m.b(m.a(x))

    net = Constructed(run, a=linear(3, 4), spare=linear(3, 4), b=linear(4, 2)).eval()
    found = couple(net, torch.randn(5, 3))
    assert units(found, "a.weight", 0) == [[0], [1], [2], [3]]
    assert found.unused == ("spare.weight",)


def test_a_cache_that_is_given_does_not_grow() -> None:
    def run(m: Any, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(m.a(x))
        return m.b(torch.stack(list(cache)).sum(0))

    cache: list[Tensor] = []
    couple(Constructed(run, a=linear(3, 4), b=linear(4, 2)), (torch.randn(5, 3), cache))
    assert cache == []
