from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from tersor.core.certificate import Certificate
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.measure import exact_paired
from tersor.measure.certificate import certify, certify_metric, examples_needed, smallest_certifiable


def flips(losses: int, gains: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    reference, candidate = np.ones(n), np.ones(n)
    candidate[:losses] = 0
    reference[losses : losses + gains] = 0
    return reference, candidate


def f1(outputs: Any, labels: Any) -> float:
    predicted = outputs > 0
    both = float((predicted & (labels == 1)).sum())
    return 2 * both / max(float(predicted.sum()) + float((labels == 1).sum()), 1.0)


# --- 0/1 scores


def test_binary_scores_use_the_exact_test() -> None:
    certificate = certify(*flips(30, 25, 2000), max_drop=0.02)
    assert certificate.method == "exact-paired"
    assert (certificate.losses, certificate.gains, certificate.n) == (30, 25, 2000)
    assert certificate.drop == pytest.approx(5 / 2000)
    assert certificate.upper_bound == exact_paired.upper_bound(30, 25, 2000, 0.95)
    assert certificate.exact
    assert certificate.certified
    assert certificate.measures == "metric"
    assert certificate.examples_needed is None
    assert Certificate.model_validate_json(certificate.model_dump_json()) == certificate


@pytest.mark.parametrize(
    "kind",
    [
        lambda scores: scores.astype(bool),
        lambda scores: [int(score) for score in scores],
        lambda scores: torch.tensor(scores, dtype=torch.float32, requires_grad=True),
        lambda scores: torch.tensor(scores, dtype=torch.bfloat16),
        lambda scores: torch.tensor(scores) > 0.5,
    ],
    ids=["bool", "list", "grad", "bfloat16", "tensor-bool"],
)
def test_every_kind_of_scores_gives_the_same_certificate(kind: Any) -> None:
    reference, candidate = flips(5, 2, 300)
    expected = certify(reference, candidate, max_drop=0.05)
    assert certify(kind(reference), kind(candidate), max_drop=0.05) == expected


def test_settings_may_be_numpy_numbers_or_integers() -> None:
    scores = flips(5, 2, 300)
    expected = certify(*scores, max_drop=0.25)
    assert certify(*scores, max_drop=np.float32(0.25), confidence=np.float64(0.95)) == expected
    assert certify(*scores, max_drop=0).examples_needed is None
    assert certify(*scores, max_drop=1).certified


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))
def test_order_of_examples_does_not_matter(losses: int, gains: int, seed: int) -> None:
    reference, candidate = flips(losses, gains, 200)
    order = np.random.default_rng(seed).permutation(200)
    same = certify(reference[order], candidate[order], max_drop=0.5)
    assert same == certify(reference, candidate, max_drop=0.5)


def test_false_certification_when_the_drop_equals_the_budget() -> None:
    generator, repetitions, wrong = np.random.default_rng(11), 400, 0
    for _ in range(repetitions):
        difference = generator.choice([1, -1, 0], 250, p=[0.07, 0.04, 0.89])
        losses, gains = int((difference == 1).sum()), int((difference == -1).sum())
        wrong += exact_paired.p_value(losses, gains, 250, 0.03) <= 0.05
    assert wrong <= binom.ppf(0.999, repetitions, 0.05)


def test_agreement_is_clopper_pearson() -> None:
    reference, candidate = np.ones(400), np.ones(400)
    candidate[:7] = 0
    certificate = certify(reference, candidate, max_drop=0.05, agreement=True)
    assert certificate.method == "clopper-pearson"
    assert certificate.measures == "agreement"
    assert certificate.upper_bound == pytest.approx(beta.ppf(0.95, 8, 393), abs=1e-9)
    assert (certificate.losses, certificate.gains, certificate.exact) == (7, 0, True)
    flawless = certify(reference, np.ones(400), max_drop=0.05, agreement=True, confidence=0.99)
    assert flawless.upper_bound == pytest.approx(1 - 0.01 ** (1 / 400), abs=1e-9)
    assert certify(np.ones(9), np.zeros(9), max_drop=0.5, agreement=True).upper_bound == 1
    assert certify(reference, candidate, max_drop=0.05).method == "exact-paired"  # only when it is declared


def test_agreement_is_refused_when_it_is_not_one() -> None:
    with pytest.raises(DataError, match="index 3"):
        certify([1, 1, 1, 0], [1, 1, 1, 1], max_drop=0.1, agreement=True)
    with pytest.raises(DataError, match="only 0 and 1"):
        certify([1, 1], [1, 0.5], max_drop=0.1, agreement=True)


# --- other scores


def test_bounded_scores_use_betting() -> None:
    generator = np.random.default_rng(0)
    reference = generator.uniform(0, 5, 800)
    candidate = np.clip(reference + generator.normal(0, 0.1, 800), 0, 5)
    certificate = certify(reference, candidate, max_drop=0.1, bounds=(0, 5))
    assert certificate.method == "betting"
    assert certificate.exact
    assert certificate.certified
    assert certificate.drop < certificate.upper_bound < 0.1
    assert (certificate.losses, certificate.gains, certificate.examples_needed) == (None, None, None)


def test_binary_values_of_a_wider_score_are_not_taken_for_binary() -> None:
    reference, candidate = flips(3, 3, 100)
    assert certify(reference, candidate, max_drop=0.5, bounds=(0, 5)).method == "betting"
    assert certify(reference, candidate, max_drop=0.5, bounds=(0, 1)).method == "exact-paired"


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@settings(max_examples=5, deadline=None)
@given(scale=st.floats(0.01, 100))
def test_scaling_the_score_scales_the_certificate(bounds: tuple[float, float] | None, scale: float) -> None:
    generator = np.random.default_rng(5)
    reference, candidate = generator.uniform(0, 1, (2, 60))
    plain = certify(reference, candidate, max_drop=0.2, bounds=bounds)
    scaled_bounds = None if bounds is None else (bounds[0] * scale, bounds[1] * scale)
    scaled = certify(reference * scale, candidate * scale, max_drop=0.2 * scale, bounds=scaled_bounds)
    assert scaled.upper_bound == pytest.approx(plain.upper_bound * scale, rel=1e-6)
    assert scaled.certified == plain.certified


def test_unbounded_scores_use_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    reference = generator.normal(0, 1, 300)
    candidate = reference - 0.01 + generator.normal(0, 0.1, 300)
    certificate = certify(reference, candidate, max_drop=0.05)
    differences = reference - candidate
    normal = differences.mean() + 1.645 * differences.std() / math.sqrt(300)
    assert certificate.method == "paired-bootstrap"
    assert not certificate.exact
    assert certificate.upper_bound == pytest.approx(normal, abs=0.002)
    assert certificate == certify(reference, candidate, max_drop=0.05)


def test_bootstrap_without_any_spread() -> None:
    scores = np.random.default_rng(2).normal(0, 1, 50)
    assert certify(scores, scores, max_drop=0.0).upper_bound == 0
    assert certify(scores, scores - 0.25, max_drop=0.1).upper_bound == pytest.approx(0.25)
    assert math.isfinite(certify([0.3, 0.7], [0.3, 0.1], max_drop=0.1).upper_bound)
    almost = certify(scores, scores - np.where(np.arange(50) == 0, 1e-13, 0.0), max_drop=0.1)
    assert 0 <= almost.upper_bound < 1e-12
    with pytest.raises(DataError, match="at least 2"):
        certify([0.5], [0.2], max_drop=0.1)


# --- metrics without a score per example


def test_metric_without_scores_per_example() -> None:
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 2, 400)
    reference = labels * 2.0 - 1 + generator.normal(0, 0.8, 400)
    candidate = reference + generator.normal(0, 0.2, 400)
    certificate = certify_metric(f1, reference, candidate, labels, max_drop=0.05, resamples=400)
    assert (certificate.method, certificate.exact, certificate.n) == ("paired-bootstrap", False, 400)
    assert certificate.drop == pytest.approx(f1(reference, labels) - f1(candidate, labels))
    assert certificate.drop <= certificate.upper_bound < certificate.drop + 0.05
    tensors = [torch.tensor(values) for values in (reference, candidate, labels)]
    assert certify_metric(f1, *tensors, max_drop=0.05, resamples=400) == certificate
    lists = [values.tolist() for values in (reference, candidate, labels)]
    assert certify_metric(f1, *lists, max_drop=0.05, resamples=400) == certificate


def test_metric_where_lower_is_better() -> None:
    def error(outputs: Any, labels: Any) -> float:
        return float(abs(outputs - labels).mean())

    labels = np.linspace(0, 1, 200)
    reference, candidate = labels + 0.1, labels + 0.3
    certificate = certify_metric(error, reference, candidate, labels, max_drop=0.1, higher_is_better=False)
    assert certificate.drop == pytest.approx(0.2)
    assert certificate.upper_bound == pytest.approx(0.2)
    assert not certificate.certified


def test_metric_errors() -> None:
    ones = np.ones(20)
    with pytest.raises(NonFiniteError, match="all examples"):
        certify_metric(lambda outputs, labels: math.nan, ones, ones, ones, max_drop=0.1)
    with pytest.raises(NonFiniteError, match="bootstrap draw"):
        certify_metric(lambda o, _: 1.0 if o[0] == 0 else math.inf, np.arange(20), np.arange(20), ones, max_drop=0.1)
    with pytest.raises(ConfigError, match="at least 19"):
        certify_metric(f1, ones, ones, ones, max_drop=0.1, resamples=10)
    assert certify_metric(f1, ones, ones, ones, max_drop=0.1, resamples=19).upper_bound == 0
    with pytest.raises(DataError, match="candidate_outputs has 19"):
        certify_metric(f1, ones, ones[1:], ones, max_drop=0.1)
    with pytest.raises(DataError, match="at least 2"):
        certify_metric(f1, [1.0], [1.0], [1], max_drop=0.1)


# --- planning


def test_a_failed_certificate_says_how_many_examples_would_do() -> None:
    certificate = certify(*flips(10, 10, 500), max_drop=0.01)
    assert not certificate.certified
    assert certificate.examples_needed == examples_needed(0.02, 0.02, max_drop=0.01)
    assert certificate.examples_needed is not None
    assert 2300 < certificate.examples_needed < 2700
    assert certify(*flips(20, 10, 500), max_drop=0.02).examples_needed is None  # the drop is the budget
    assert certify(*flips(0, 0, 50), max_drop=0.01).examples_needed == 299


@pytest.mark.parametrize(
    ("loss_rate", "gain_rate", "max_drop"), [(0.02, 0.02, 0.02), (0.05, 0.01, 0.08), (0.1, 0, 0.2)]
)
def test_examples_needed_reaches_the_power_and_not_much_fewer_do(
    loss_rate: float, gain_rate: float, max_drop: float
) -> None:
    needed = examples_needed(loss_rate, gain_rate, max_drop=max_drop)
    assert needed is not None
    assert exact_paired.power(loss_rate, gain_rate, needed, max_drop, 0.95) >= 0.8
    assert exact_paired.power(loss_rate, gain_rate, int(needed * 0.93), max_drop, 0.95) < 0.8


def test_examples_needed_at_the_edges() -> None:
    assert examples_needed(0.02, 0.01, max_drop=0.01) is None
    assert examples_needed(0.0, 0.0, max_drop=0.01) == 299
    assert examples_needed(0.01, 0.05, max_drop=0.0, confidence=0.9) is not None
    assert examples_needed(0.02, 0.02, max_drop=0.001) == pytest.approx(0.04 * 2.486**2 / 1e-6, rel=0.01)
    with pytest.raises(ConfigError, match="power"):
        examples_needed(0.1, 0.1, max_drop=0.1, power=1.0)
    with pytest.raises(ConfigError, match="loss_rate"):
        examples_needed(-0.1, 0.1, max_drop=0.1)


@pytest.mark.parametrize(("max_drop", "confidence"), [(0.01, 0.95), (0.005, 0.99), (0.3, 0.8), (0.0005, 0.95)])
def test_smallest_certifiable_is_the_smallest(max_drop: float, confidence: float) -> None:
    n = smallest_certifiable(max_drop, confidence)
    assert exact_paired.upper_bound(0, 0, n, confidence) <= max_drop
    assert exact_paired.upper_bound(0, 0, n - 1, confidence) > max_drop
    assert n >= math.log(1 - confidence) / math.log1p(-max_drop)


def test_smallest_certifiable_at_the_edges() -> None:
    assert smallest_certifiable(0.01, 0.95) == 299
    assert smallest_certifiable(1.0, 0.95) == 1
    with pytest.raises(ConfigError, match="no number of examples"):
        smallest_certifiable(0.0, 0.95)
    with pytest.raises(ConfigError, match="no number of examples"):
        smallest_certifiable(0.01, 1 - 1e-7)


# --- errors


@pytest.mark.parametrize(
    ("reference", "candidate", "options", "error", "message"),
    [
        ([1, 0, 1], [1, 0], {}, DataError, "reference_scores has 3, candidate_scores has 2"),
        ([], [], {}, DataError, "at least one score"),
        ([[1.0], [0.0]], [1, 0], {}, DataError, r"shape \(2, 1\)"),
        (1.0, 1.0, {}, DataError, r"shape \(\)"),
        (["good", "bad"], [1, 0], {}, DataError, "one number per example"),
        ([1, math.nan, math.inf], [1, 1, 1], {}, NonFiniteError, "2 NaN or Inf of 3, the first at index 1"),
        ([1, 1], [1, -math.inf], {}, NonFiniteError, "candidate_scores"),
        ([0.5, 1.5], [0.5, 0.5], {"bounds": (0, 1)}, DataError, "1 of 2 outside, the first at index 1"),
        ([0.5, 0.5], [0.5, 0.5], {"bounds": (1, 0)}, ConfigError, "lowest < highest"),
        ([0.5, 0.5], [0.5, 0.5], {"bounds": (0, math.inf)}, ConfigError, "bounds"),
        ([1, 0], [1, 0], {"max_drop": 1.5}, ConfigError, r"fraction in \[0, 1\]"),
        ([1, 0], [1, 0], {"max_drop": -0.1}, ConfigError, "max_drop"),
        ([1, 0], [1, 0], {"max_drop": math.nan}, ConfigError, "max_drop"),
        ([1, 0], [1, 0], {"max_drop": "1%"}, ConfigError, "max_drop"),
        ([0.5, 0.2], [0.5, 0.3], {"max_drop": math.inf}, ConfigError, "max_drop"),
        ([1, 0], [1, 0], {"confidence": 1.0}, ConfigError, "confidence"),
        ([1, 0], [1, 0], {"confidence": 95}, ConfigError, "confidence"),
    ],
)
def test_errors(reference: Any, candidate: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certify(reference, candidate, **{"max_drop": 0.1, **options})
