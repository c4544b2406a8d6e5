from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.graph.coupling.labels import (
    Blocks,
    Ledger,
    Operand,
    along,
    axis,
    compact,
    disjoint,
    forbid,
    restrict,
    support,
    tie,
    unify,
)


def ledger_with(*sizes: int) -> tuple[Ledger, list[Tensor]]:
    ledger = Ledger()
    return ledger, [ledger.fresh(size) for size in sizes]


def together(ledger: Ledger, left: Tensor, right: Tensor) -> bool:
    """Whether labels are in the same classes, entry by entry."""
    classes = torch.from_numpy(ledger.classes())
    return bool((classes[left] == classes[right]).all())


def frozen(ledger: Ledger, labels: Tensor) -> list[bool]:
    classes = ledger.classes()
    reasons = ledger.frozen(classes)
    return [int(classes[label]) in reasons for label in labels.flatten().tolist()]


def shapes(blocks: Blocks) -> list[tuple[int, ...]]:
    return [tuple(block.shape) for block in blocks]


def test_fresh_labels_are_new_and_never_the_fixed_one() -> None:
    _, (first, second) = ledger_with(3, 2)
    assert torch.cat([first, second]).tolist() == [1, 2, 3, 4, 5]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 19), st.integers(1, 19)), max_size=30))
def test_classes_are_the_connected_parts(pairs: list[tuple[int, int]]) -> None:
    ledger, _ = ledger_with(19)
    colour = list(range(20))
    for left, right in pairs:
        ledger.unite(torch.tensor([left]), torch.tensor([right]))
        old, new = colour[left], colour[right]
        colour = [new if number == old else number for number in colour]
    classes = ledger.classes()
    for left in range(20):
        for right in range(20):
            assert (classes[left] == classes[right]) == (colour[left] == colour[right])


def test_what_meets_the_fixed_label_is_frozen_and_does_not_join() -> None:
    ledger, (labels,) = ledger_with(3)
    ledger.unite(labels, torch.tensor([0, 2, 0]))
    assert frozen(ledger, labels) == [True, False, True]
    assert not together(ledger, labels[:1], labels[2:])


def test_freezing_one_label_freezes_its_class() -> None:
    ledger, (left, right) = ledger_with(2, 2)
    ledger.unite(left, right)
    ledger.freeze(left[:1], "")
    assert frozen(ledger, right) == [True, False]


def test_the_first_reason_that_says_something_is_kept_with_its_place() -> None:
    ledger, (labels,) = ledger_with(1)
    ledger.freeze(labels, "")
    ledger.where = "aten.roll in layer"
    ledger.freeze(labels, "it is shifted")
    ledger.freeze(labels, "later")
    assert ledger.frozen(ledger.classes())[int(ledger.classes()[1])] == "it is shifted (aten.roll in layer)"


def test_support_is_the_dimensions_that_a_block_speaks_about() -> None:
    assert support(torch.ones(1, 3, 1, 2)) == {1, 3}


def test_restrict_unites_along_the_other_dimensions() -> None:
    ledger, (labels,) = ledger_with(6)
    (block,) = restrict(ledger, labels.reshape(2, 3), {0})
    assert block.shape == (2, 1)
    assert together(ledger, labels.reshape(2, 3), block.expand(2, 3))
    assert not together(ledger, labels[:1], labels[3:4])


def test_restrict_to_nothing_freezes() -> None:
    ledger, (labels,) = ledger_with(3)
    assert restrict(ledger, labels.reshape(1, 3), {0}, "why") == ()
    assert frozen(ledger, labels) == [True] * 3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sets(st.integers(0, 3)))
def test_restrict_speaks_about_no_other_dimension(shape: list[int], dims: set[int]) -> None:
    ledger = Ledger()
    block = ledger.fresh(torch.Size(shape).numel()).reshape(shape)
    for found in restrict(ledger, block, dims):
        assert support(found) == support(block) & dims
        assert together(ledger, block, found.expand(shape))


def test_forbid_leaves_other_blocks_alone() -> None:
    ledger, (rows, columns) = ledger_with(2, 3)
    blocks = (*along(rows, 0, 2), *along(columns, 1, 2))
    assert shapes(forbid(ledger, blocks, 1, "why")) == [(2, 1)]
    assert frozen(ledger, columns) == [True] * 3
    assert frozen(ledger, rows) == [False] * 2


def test_forbid_makes_a_joint_block_fall_back_to_its_other_dimension() -> None:
    ledger, (labels,) = ledger_with(6)
    assert shapes(forbid(ledger, (labels.reshape(2, 3),), 1, "why")) == [(2, 1)]
    assert frozen(ledger, labels) == [False] * 6


def test_axis_gives_the_labels_of_one_dimension_by_itself() -> None:
    ledger, (labels, rows) = ledger_with(6, 4)
    blocks = (labels.reshape(1, 2, 3), rows.reshape(4, 1, 1))
    assert axis(ledger, blocks, 0) is not None
    found = axis(ledger, blocks, 1)
    assert found is not None
    assert found.tolist() == [1, 4]
    assert axis(ledger, (), 0) is None


def test_tie_to_a_fixed_dimension_freezes() -> None:
    ledger, (left, right, other) = ledger_with(2, 2, 2)
    assert tie(ledger, left, right) is left
    assert together(ledger, left, right)
    assert tie(ledger, None, other) is None
    assert frozen(ledger, other) == [True, True]
    assert tie(ledger, None, None) is None


def test_compact_drops_dimensions_that_repeat() -> None:
    ledger, (labels,) = ledger_with(3)
    assert shapes(compact(ledger, labels.reshape(3, 1).expand(3, 4))) == [(3, 1)]
    assert shapes(compact(ledger, labels.repeat(2))) == [(6,)]
    assert frozen(ledger, labels) == [False] * 3


def test_compact_freezes_a_single_label_and_forgets_an_empty_block() -> None:
    ledger, (labels,) = ledger_with(2)
    assert compact(ledger, labels[:1].reshape(1, 1)) == ()
    assert compact(ledger, labels[:0]) == ()
    assert frozen(ledger, labels) == [True, False]


def test_disjoint_prefers_labels_of_parameters_then_the_outer_dimension() -> None:
    ledger, (learned, new, other) = ledger_with(3, 2, 3)
    inner, outer = learned.reshape(1, 3), torch.cat([new, new, new]).reshape(2, 3)
    assert disjoint(ledger, [outer, inner], learned=4) == (inner,)
    assert frozen(ledger, new) == [True, True]
    assert disjoint(ledger, [other.reshape(1, 3), new.reshape(2, 1)], learned=1)[0].shape == (2, 1)


def test_unify_unites_entry_by_entry_where_all_speak_about_the_same() -> None:
    ledger, (left, right) = ledger_with(6, 6)
    operands = [Operand((2, 3), (left.reshape(2, 3),)), Operand((2, 3), (right.reshape(2, 3),))]
    assert shapes(unify(ledger, operands)) == [(2, 3)]
    assert together(ledger, left, right)
    assert not together(ledger, left[:1], left[1:2])


def test_unify_makes_heads_atomic_where_a_dimension_is_treated_apart() -> None:
    ledger, (left, right) = ledger_with(6, 6)
    operands = [Operand((2, 3), (left.reshape(2, 3),)), Operand((2, 3), (right.reshape(2, 3),))]
    assert shapes(unify(ledger, operands, apart={1})) == [(2, 1)]
    assert together(ledger, left.reshape(2, 3), right.reshape(2, 3)[:, :1].expand(2, 3))
    assert not together(ledger, left[:1], left[3:4])


def test_unify_broadcasts_over_operands_of_size_one() -> None:
    ledger, (rows, columns) = ledger_with(2, 3)
    operands = [Operand((2, 1), along(rows, 0, 2)), Operand((1, 3), along(columns, 1, 2))]
    assert sorted(shapes(unify(ledger, operands))) == [(1, 3), (2, 1)]
    assert frozen(ledger, torch.cat([rows, columns])) == [False] * 5


def test_unify_freezes_what_meets_a_fixed_dimension() -> None:
    ledger, (labels,) = ledger_with(3)
    assert unify(ledger, [Operand((2, 3), along(labels, 1, 2)), Operand((2, 3), ())]) == ()
    assert frozen(ledger, labels) == [True] * 3


def test_unify_keeps_the_outer_dimension_where_a_joint_block_meets_one_of_its_dimensions() -> None:
    ledger, (joint, rows) = ledger_with(6, 2)
    operands = [Operand((2, 3), (joint.reshape(2, 3),)), Operand((2, 1), along(rows, 0, 2))]
    assert shapes(unify(ledger, operands)) == [(2, 1)]
    assert together(ledger, joint.reshape(2, 3), rows.reshape(2, 1).expand(2, 3))


@pytest.mark.parametrize(
    ("vector", "expected"), [(None, []), (torch.tensor([4]), []), (torch.tensor([4, 5]), [(1, 2)])]
)
def test_along_says_nothing_about_single_entries(vector: Tensor | None, expected: list[tuple[int, ...]]) -> None:
    assert shapes(along(vector, 1, 2)) == expected
