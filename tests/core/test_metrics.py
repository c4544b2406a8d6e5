from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from tersor.core.metrics import METRICS, Metric, as_metric
from tersor.errors import DataError, NonFiniteError
from zoo import integers, normal


def evaluate(name: str, outputs: Tensor, labels: Tensor | None) -> float:
    metric = as_metric(name)
    return metric.value(metric.statistic(outputs, labels), labels)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 10_000))
def test_top1_and_f1_agree_with_scikit_learn(classes: int, n: int, seed: int) -> None:
    outputs, labels = normal(n, classes, seed=seed), integers(classes, n, seed=seed)
    predicted = outputs.argmax(1)
    assert evaluate("top1", outputs, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert evaluate("f1", outputs, labels) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_f1_by_hand() -> None:
    outputs = torch.eye(3)[[0, 0, 1, 1, 1]]  # class 2 is never predicted
    labels = torch.tensor([0, 1, 1, 1, 2])
    # class 0: precision 1/2, recall 1 -> 2/3; class 1: precision 2/3, recall 2/3 -> 2/3; class 2: 0
    assert evaluate("f1", outputs, labels) == pytest.approx(4 / 9)


def test_f1_does_not_depend_on_the_batches() -> None:
    outputs, labels, metric = normal(50, 4), integers(4, 50), METRICS["f1"]
    parts = torch.cat([metric.statistic(outputs[at : at + 7], labels[at : at + 7]) for at in range(0, 50, 7)])
    assert metric.value(parts, labels) == evaluate("f1", outputs, labels)


def test_top1_of_tokens_is_per_token() -> None:
    outputs = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 3, 3]])]
    statistic = METRICS["top1"].statistic(outputs, torch.tensor([[0, 1, 0], [3, 0, 0]]))
    assert statistic.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_perplexity_by_hand() -> None:
    outputs, labels = normal(5, 7, 11), integers(11, 5, 7)
    logits = outputs.double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probabilities, labels.numpy()[..., None], -1)
    assert evaluate("perplexity", outputs, labels) == pytest.approx(math.exp(-np.log(picked).mean()))
    assert evaluate("perplexity", torch.zeros(3, 11), integers(11, 3)) == pytest.approx(11)
    assert not METRICS["perplexity"].higher_is_better


def test_perplexity_too_large_for_a_number_is_refused_by_name() -> None:
    with pytest.raises(NonFiniteError, match="perplexity"):
        evaluate("perplexity", torch.tensor([[1e4, 0.0]]), torch.tensor([1]))


def test_agreement_and_cosine_compare_with_the_original() -> None:
    outputs, original = normal(20, 5), normal(20, 5, seed=1)
    same = (outputs.argmax(1) == original.argmax(1)).double().mean()
    assert evaluate("agreement", outputs, original) == pytest.approx(float(same))
    assert evaluate("agreement", outputs, outputs) == 1
    a, b = outputs.double().numpy(), original.double().numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert evaluate("cosine", outputs, original) == pytest.approx(cosine.mean())
    assert evaluate("cosine", outputs, -3 * outputs) == pytest.approx(-1)
    assert METRICS["agreement"].against_original
    assert METRICS["cosine"].against_original


def test_a_function_sees_all_outputs_and_labels_at_once() -> None:
    seen = []

    def largest(outputs: Tensor, labels: Tensor) -> float:
        seen.append((outputs, labels))
        return float(outputs.max())

    metric = as_metric(largest)
    outputs, labels = normal(9, 2), integers(2, 9)
    parts = torch.cat([metric.statistic(outputs[:4], labels[:4]), metric.statistic(outputs[4:], labels[4:])])
    assert metric.name == "largest"
    assert not metric.per_example
    assert metric.value(parts, labels) == float(outputs.max())
    assert torch.equal(seen[0][0], outputs)
    assert torch.equal(seen[0][1], labels)
    with pytest.raises(DataError, match="needs labels"):
        metric.value(parts, None)


@pytest.mark.parametrize("name", ["top1", "f1", "perplexity"])
@pytest.mark.parametrize("bad", [3, -1, -100])
def test_a_label_out_of_range_is_named(name: str, bad: int) -> None:
    with pytest.raises(DataError, match=rf"0\.\.2 .* got {bad} at position 1"):
        METRICS[name].statistic(normal(3, 3), torch.tensor([0, bad, 1]))


@pytest.mark.parametrize("name", ["top1", "f1", "perplexity"])
def test_labels_that_are_missing_or_no_classes_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"'{name}' needs labels"):
        METRICS[name].statistic(normal(3, 3), None)
    with pytest.raises(DataError, match="integer class labels"):
        METRICS[name].statistic(normal(3, 3), normal(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_refused_by_name(value: float) -> None:
    def broken(outputs: Tensor, labels: Tensor) -> float:
        return value

    with pytest.raises(NonFiniteError, match="'broken' returned"):
        as_metric(broken).value(normal(3, 3), integers(3, 3))
    with pytest.raises(NonFiniteError, match="'mean'"):
        Metric("mean", lambda outputs, labels: outputs).value(torch.tensor([0.0, value]), None)


def test_bounds_hold_for_what_claims_them() -> None:
    outputs, original, labels = normal(200, 3), normal(200, 3, seed=1), integers(3, 200)
    for metric in METRICS.values():
        if metric.bounds is not None:
            statistic = metric.statistic(outputs, original if metric.against_original else labels)
            assert metric.bounds[0] <= float(statistic.min())
            assert float(statistic.max()) <= metric.bounds[1]
            assert metric.per_example
