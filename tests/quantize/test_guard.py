"""What counts as destroyed, and what only as bad."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tersor.core.candidate import Candidate
from tersor.errors import AccuracyError
from tersor.quantize.guard import check_usable, output_errors
from tersor.quantize.prepare import Batches, Prepared, batches_of, prepare, set_activation_ranges, set_weight_ranges
from tersor.quantize.widths import Widths
from zoo import CNN_DATA, Cnn, context_for, integers, normal, seeded

RANKED = [("head", 0.4), ("stem", 1.5), ("block.0", 0.9)]


def ready(**widths: int) -> tuple[Prepared, Batches]:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA)
    prepared = prepare(Candidate(module), context, "test", Widths(**widths))
    batches = batches_of(context.task.splits["calibrate"], 48, 16)
    set_activation_ranges(prepared, "minmax", batches)
    set_weight_ranges(prepared)
    return prepared, batches


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return ready(weight_bits=2)[0]


def scores(predicted: Tensor, classes: int = 10) -> Tensor:
    return functional.one_hot(predicted, classes).float() + 0.01 * normal(len(predicted), classes)


def changed(predicted: Tensor, share: float) -> Tensor:
    """Other classes for this share of the examples."""
    count = round(share * len(predicted))
    return torch.cat([(predicted[:count] + 1) % 10, predicted[count:]])


BEFORE = integers(10, 300)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.8])
def test_bad_is_not_destroyed(prepared: Prepared, share: float) -> None:
    check_usable(prepared, scores(BEFORE), scores(changed(BEFORE, share)), RANKED)


@pytest.mark.parametrize("seed", range(1, 21))
def test_random_answers_are_destroyed(prepared: Prepared, seed: int) -> None:
    with pytest.raises(AccuracyError, match="where chance gives"):
        check_usable(prepared, scores(BEFORE), scores(integers(10, 300, seed=seed)), RANKED)


def test_the_message_ranks_layers_and_says_what_to_do(prepared: Prepared) -> None:
    with pytest.raises(AccuracyError) as caught:
        check_usable(prepared, scores(BEFORE), scores(changed(BEFORE, 1.0)), lambda: RANKED)
    said = str(caught.value)
    assert "is the original's for 0 of 300 examples" in said
    assert "largest first: stem 1.50 at 8 bits, block.0 0.90 at 2 bits, head 0.40 at 8 bits" in said
    for advice in ("weight_bits", "overrides", "quantize.mixed", "quantize.fallback", "train"):
        assert advice in said


def test_layers_are_ranked_only_if_something_is_wrong(prepared: Prepared) -> None:
    def never() -> list[tuple[str, float]]:
        raise AssertionError("costs time")

    check_usable(prepared, scores(BEFORE), scores(BEFORE), never)


def test_a_rare_class_is_no_agreement(prepared: Prepared) -> None:
    before = (torch.arange(300) % 20 == 0).long()  # 95 % of one class
    with pytest.raises(AccuracyError, match="answers the same"):
        check_usable(prepared, scores(before, 2), torch.ones(300, 2), RANKED)
    with pytest.raises(AccuracyError, match=r"for 285 of 300 examples, where chance gives 95\.0%"):
        check_usable(prepared, scores(before, 2), scores(torch.zeros(300, dtype=torch.long), 2), RANKED)
    check_usable(prepared, scores(before, 2), scores(before, 2), RANKED)


def test_few_examples_or_one_class_tell_nothing(prepared: Prepared) -> None:
    few = torch.tensor([0, 1])
    check_usable(prepared, scores(few, 2), scores(1 - few, 2), RANKED)
    same = torch.zeros(300, dtype=torch.long)
    check_usable(prepared, scores(same), scores(same), RANKED)
    check_usable(prepared, torch.ones(30, 4), torch.ones(30, 4), RANKED)  # the original is constant too


def test_seven_examples_of_which_one_differs_are_fine(prepared: Prepared) -> None:
    before = torch.arange(7) % 2
    after = before.clone()
    after[0] = 1 - after[0]
    check_usable(prepared, scores(before, 2), scores(after, 2), RANKED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_are_not_finite(prepared: Prepared, bad: float) -> None:
    after = scores(BEFORE)
    after[3, 4] = bad
    with pytest.raises(AccuracyError, match="1 of 3000 output values are NaN or Inf"):
        check_usable(prepared, scores(BEFORE), after, RANKED)


def test_other_outputs_must_be_nearer_than_zero(prepared: Prepared) -> None:
    before = normal(20, 3, 4)
    check_usable(prepared, before, torch.zeros_like(before), RANKED)
    check_usable(prepared, before[..., :1].flatten(1)[:, :1], before[..., :1].flatten(1)[:, :1] * 1.5, RANKED)
    with pytest.raises(AccuracyError, match=r"relative error of its output is 2\.00"):
        check_usable(prepared, before, -before, [])


def test_output_errors_grow_as_bits_shrink_and_leave_everything_as_it_is() -> None:
    found = {}
    for bits in (2, 8):
        prepared, batches = ready(weight_bits=bits, edge_bits=bits, activation_bits=8)
        with torch.no_grad():
            before = prepared.simulation(CNN_DATA)
            found[bits] = dict(output_errors(prepared, batches))
            assert torch.equal(prepared.simulation(CNN_DATA), before)
    assert set(found[2]) == {"stem", "block.0", "head"}
    assert all(found[2][layer] > 10 * found[8][layer] > 0 for layer in found[2])
    assert list(found[2].values()) == sorted(found[2].values(), reverse=True)
