"""Evaluation over a split, and what changed between two models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.metrics import METRICS, Metric, as_metric
from tersor.core.split import Split
from tersor.errors import DataError, NonFiniteError, OutputError
from tersor.measure import Evaluation, changes, evaluate
from tersor.measure.accuracy import score_bounds, scores
from tersor.measure.changes import calibration_error

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 1, 0])


def labelled(name: str = "report") -> Split:
    return Split(name, (LOGITS, LABELS))


def same(x: Tensor) -> Tensor:
    """A model whose outputs are its inputs."""
    return x


def evaluation(predictions: list[int], labels: list[int] | None, confidences: list[float] | None = None) -> Evaluation:
    return Evaluation(
        value=0.0,
        statistic=torch.zeros(len(predictions)),
        labels=None if labels is None else torch.tensor(labels),
        predictions=torch.tensor(predictions),
        confidences=None if confidences is None else torch.tensor(confidences),
    )


# --- evaluate


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    found = evaluate(same, labelled(), METRICS["top1"], batch_size=batch_size)
    assert found.value == pytest.approx(4 / 5)
    assert found.statistic.tolist() == [1, 1, 0, 1, 1]
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()
    assert found.predictions is not None
    assert found.predictions.tolist() == [0, 1, 0, 1, 0]
    assert found.confidences is not None
    torch.testing.assert_close(found.confidences, LOGITS.softmax(1).amax(1))


def test_the_model_gets_batches_of_the_wanted_size() -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    progress: list[tuple[int, int]] = []
    evaluate(
        watched, labelled(), METRICS["top1"], batch_size=2, progress=lambda done, total: progress.append((done, total))
    )
    assert seen == [2, 2, 1]
    assert progress == [(2, 5), (4, 5), (5, 5)]


def test_it_keeps_no_gradients() -> None:
    found = evaluate(nn.Linear(2, 2), labelled(), METRICS["perplexity"], batch_size=3)
    assert not found.statistic.requires_grad


@pytest.mark.parametrize("select", ["logits", 1])
def test_the_declared_output_counts(select: str | int) -> None:
    def several(x: Tensor) -> Any:
        return {"logits": x, "extra": -x} if select == "logits" else (-x, x)

    assert evaluate(several, labelled(), METRICS["top1"], batch_size=2, select=select).value == pytest.approx(0.8)
    with pytest.raises(OutputError, match="declare one"):
        evaluate(several, labelled(), METRICS["top1"], batch_size=2)


def test_agreement_is_measured_against_the_original() -> None:
    unlabelled = Split("report", LOGITS)
    original = evaluate(same, unlabelled, METRICS["agreement"], batch_size=2, against="itself")
    assert original.value == 1
    assert original.labels is not None

    def flipping(x: Tensor) -> Tensor:
        return torch.where(x.sum(1, keepdim=True) > 4, -x, x)  # only the last example's sum is above 4

    other = evaluate(flipping, unlabelled, METRICS["agreement"], batch_size=3, against=original.labels)
    assert other.statistic.tolist() == [1, 1, 1, 1, 0]
    assert other.value == pytest.approx(0.8)


def test_cosine_compares_whole_outputs() -> None:
    original = evaluate(same, Split("report", LOGITS), METRICS["cosine"], batch_size=2, against="itself")
    doubled = evaluate(
        lambda x: 2 * x, Split("report", LOGITS), METRICS["cosine"], batch_size=2, against=original.labels
    )
    assert doubled.value == pytest.approx(1)
    turned = evaluate(lambda x: -x, Split("report", LOGITS), METRICS["cosine"], batch_size=2, against=original.labels)
    assert turned.value == pytest.approx(-1)


def test_outputs_that_are_no_classes_give_no_predictions() -> None:
    regression = Split("report", (LOGITS[:, :1], LOGITS[:, 0]))
    error = as_metric(lambda outputs, truth: -float((outputs[:, 0] - truth).abs().mean()))
    found = evaluate(same, regression, error, batch_size=2)
    assert found.value == 0
    assert found.predictions is None
    assert found.confidences is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_named(bad: float) -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.where(x == 5, bad, x)

    with pytest.raises(NonFiniteError, match=r"split 'certify', batch 2, has 1 NaN or Inf of 2"):
        evaluate(broken, labelled("certify"), METRICS["top1"], batch_size=2)


@pytest.mark.parametrize("wrong", [2, -1])
@pytest.mark.parametrize("metric", ["top1", "f1", "perplexity"])
def test_a_label_out_of_range_is_named_with_its_split(metric: str, wrong: int) -> None:
    labels = LABELS.clone()
    labels[3] = wrong
    with pytest.raises(DataError, match=rf"split 'certify'.*batch 1.*0\.\.1 .* got {wrong} at position 1"):
        evaluate(same, Split("certify", (LOGITS, labels)), METRICS[metric], batch_size=2)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"split 'certify'.*integer class labels, got torch.float32"):
        evaluate(same, Split("certify", (LOGITS, LABELS.float())), METRICS["top1"], batch_size=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_named(value: float) -> None:
    def odd(outputs: Tensor, labels: Tensor) -> float:
        return value

    with pytest.raises(NonFiniteError, match=r"metric 'odd' returned (nan|inf) on 5 examples"):
        evaluate(same, labelled(), as_metric(odd), batch_size=2)


def test_the_metric_function_gets_all_examples_at_once() -> None:
    seen = []

    def custom(outputs: Tensor, labels: Tensor) -> float:
        seen.append((outputs.shape, labels.shape))
        return float((outputs.argmax(1) == labels).double().mean())

    found = evaluate(same, labelled(), as_metric(custom), batch_size=2)
    assert found.value == pytest.approx(0.8)
    assert seen == [((5, 2), (5,))]


def test_f1_is_the_mean_over_classes() -> None:
    # predictions 0 1 0 1 0, labels 0 1 1 1 0: F1 of class 0 is 4/5, of class 1 as well
    assert evaluate(same, labelled(), METRICS["f1"], batch_size=2).value == pytest.approx((4 / 5 + 4 / 5) / 2)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    uniform = evaluate(lambda x: 0 * x, labelled(), METRICS["perplexity"], batch_size=2)
    assert uniform.value == pytest.approx(2)


# --- scores for the certificate


def test_scores_are_higher_for_better() -> None:
    error = Metric(
        "error", lambda outputs, labels: (outputs[:, 0] - 1).abs(), higher_is_better=False, bounds=(0.0, 4.0)
    )
    found = evaluate(same, labelled(), error, batch_size=2)
    assert scores(found, error).tolist() == [-1, -1, -2, -1, -4]
    assert score_bounds(error) == (-4.0, 0.0)
    assert score_bounds(METRICS["top1"]) == (0.0, 1.0)
    assert score_bounds(METRICS["f1"]) is None


def test_scores_of_sequences_are_means_over_the_tokens() -> None:
    tokens = Metric("tokens", lambda outputs, labels: (outputs > 0).double())
    assert scores(evaluate(same, labelled(), tokens, batch_size=2), tokens).tolist() == [0.5] * 5


# --- changes


def test_flips_are_counted_by_direction() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    before, after = evaluation([0, 0, 1, 0, 0, 0], labels), evaluation([0, 1, 1, 1, 1, 2], labels)
    found = changes(before, after)
    assert found is not None
    assert (found.n, found.flips, found.right_to_wrong, found.wrong_to_right) == (6, 4, 1, 2)
    assert [(row.name, row.n, row.before, row.after) for row in found.per_class] == [
        ("0", 2, 1.0, 0.5),
        ("1", 2, 0.5, 1.0),
        ("2", 2, 0.0, 0.5),
    ]


def test_classes_have_their_names_as_far_as_they_are_given() -> None:
    both = evaluation([0, 1, 2], [0, 1, 2])
    found = changes(both, both, ("cat", "dog"))
    assert found is not None
    assert [row.name for row in found.per_class] == ["cat", "dog", "2"]
    assert found.flips == 0


def test_without_labels_only_flips_are_known() -> None:
    found = changes(evaluation([0, 1, 2], None), evaluation([0, 2, 2], None))
    assert found is not None
    assert (found.n, found.flips, found.right_to_wrong, found.per_class) == (3, 1, None, [])


def test_without_classes_there_is_nothing_to_compare() -> None:
    nothing = Evaluation(0.0, torch.zeros(3), None, None, None)
    assert changes(nothing, nothing) is None


def test_calibration_error_by_hand() -> None:
    # two in one bin at 0.95, one right: gap 0.45 x 2; one at 0.55, right: gap 0.45 x 1
    confidences, right = torch.tensor([0.95, 0.95, 0.55]), torch.tensor([True, False, True])
    assert calibration_error(confidences, right) == pytest.approx((2 * 0.45 + 0.45) / 3)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert calibration_error(torch.tensor([1.0]), torch.tensor([False])) == 1
    assert calibration_error(None, right) is None


def test_calibration_error_is_in_the_changes() -> None:
    found = changes(evaluation([0, 1], [0, 1], [0.9, 0.7]), evaluation([0, 0], [0, 1], [0.6, 0.8]))
    assert found is not None
    assert found.calibration_error_before == pytest.approx((0.1 + 0.3) / 2)
    assert found.calibration_error_after == pytest.approx((0.4 + 0.8) / 2)
