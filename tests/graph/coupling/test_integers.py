from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.graph.coupling.integers import (
    Attribute,
    Shape,
    Traced,
    owners,
    read_integer,
    traced_attributes,
    write_integer,
)

HEADS = Attribute("attention", "num_heads")
numbers = st.integers(1, 64)


class SmallConfig:
    """As Hugging Face models carry."""

    def __init__(self) -> None:
        self.hidden_size, self.heads_by_layer, self.name = 8, [2, 4], "small"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SmallConfig()
        self.layer = nn.Linear(8, 4)
        self.layer.config = self.config
        self.sizes, self.flag, self.one, self._private = (8, 1), True, 1, 8


@pytest.mark.parametrize(
    ("value", "scale"),
    [
        (Traced(12, HEADS) * 3, 3),
        (3 * Traced(12, HEADS), 3),
        (Traced(12, HEADS) // 4, Fraction(1, 4)),
        (Traced(12, HEADS) * 2 // 3, Fraction(2, 3)),
        (-Traced(12, HEADS), -1),
    ],
)
def test_scaling_keeps_the_origin(value: Any, scale: Fraction) -> None:
    assert value.origin == HEADS
    assert value.scale == scale
    assert value == 12 * scale


@pytest.mark.parametrize(
    "value",
    [
        Traced(12, HEADS) + 1,
        1 + Traced(12, HEADS),
        Traced(12, HEADS) - 1,
        20 - Traced(12, HEADS),
        24 // Traced(12, HEADS),
        Traced(12, HEADS) * Traced(2, HEADS),
        Traced(12, HEADS) // 5,  # does not divide: no scale brings it back
        Traced(12) * 2,
    ],
)
def test_other_arithmetic_makes_the_number_derived(value: Any) -> None:
    assert isinstance(value, Traced)
    assert value.origin is None


@given(numbers, numbers)
def test_arithmetic_is_that_of_integers(left: int, right: int) -> None:
    for traced in (Traced(left, HEADS), Traced(left)):
        for other in (right, Traced(right, HEADS)):
            assert (traced + other, traced - other, traced * other) == (left + right, left - right, left * right)
            assert (traced // other, traced % other, traced / other) == (left // right, left % right, left / right)
            assert (other + traced, other - traced, other * traced) == (right + left, right - left, right * left)
            assert (other // traced, other % traced) == (right // left, right % left)
        assert traced**-0.5 == left**-0.5
        assert (traced * 0.5, type(traced * 0.5)) == (left * 0.5, float)


def test_copies_and_pickles_are_plain_integers() -> None:
    for value in (copy.deepcopy(Traced(3, HEADS)), pickle.loads(pickle.dumps(Traced(3, HEADS)))):  # noqa: S301
        assert type(value) is int
        assert value == 3


def test_a_shape_knows_its_number_of_entries() -> None:
    assert Shape([2, Traced(3, HEADS), 4]).numel() == 24
    assert Shape([2, 3]) == torch.zeros(2, 3).shape


def test_owners_are_modules_and_each_configuration_once() -> None:
    assert [owner for owner, _ in owners(Model())] == ["", "config", "layer"]


def test_public_integers_are_traced_while_the_body_runs() -> None:
    model = Model()
    with traced_attributes(model):
        layer: Any = model.layer
        assert layer.in_features.origin == Attribute("layer", "in_features")
        assert model.sizes[0].origin == Attribute("", "sizes", 0)
        assert model.config.hidden_size.origin == Attribute("config", "hidden_size")
        assert model.config.heads_by_layer[1].origin == Attribute("config", "heads_by_layer", 1)
        plain = (model.sizes[1], model.one, model.flag, model._private, model.training, model.config.name)
        assert not any(isinstance(value, Traced) for value in plain)


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_are_restored(fails: bool) -> None:
    model = Model()
    before = [(owner, dict(attributes)) for owner, attributes in owners(model)]
    listed = model.config.heads_by_layer
    try:
        with traced_attributes(model):
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    after = [(owner, dict(attributes)) for owner, attributes in owners(model)]
    assert repr(after) == repr(before)
    assert type(model.layer.in_features) is int
    assert model.config.heads_by_layer is listed


@pytest.mark.parametrize("attribute", [Attribute("config", "heads_by_layer", 1), Attribute("", "sizes", 0)])
def test_one_position_of_a_list_or_tuple_is_written(attribute: Attribute) -> None:
    holder = dict(owners(Model()))[attribute.owner]
    kind, length = type(holder[attribute.name]), len(holder[attribute.name])
    write_integer(holder, attribute, 3)
    assert read_integer(holder, attribute) == 3
    assert type(holder[attribute.name]) is kind
    assert len(holder[attribute.name]) == length


def test_attributes_are_named_as_in_code() -> None:
    assert str(HEADS) == "attention.num_heads"
    assert str(Attribute("", "sizes", 1)) == "sizes[1]"
