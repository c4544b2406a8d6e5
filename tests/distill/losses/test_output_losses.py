from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.distill import losses
from tersor.errors import ConfigError, DataError
from zoo import integers, normal

STUDENT, TEACHER = 3 * normal(8, 10), 3 * normal(8, 10, seed=1)
Array = np.ndarray[Any, Any]


def soft(logits: Tensor, temperature: float = 1.0) -> Array:
    powers = np.exp(logits.double().numpy() / temperature)
    return powers / powers.sum(-1, keepdims=True)


def kl(of: Array, around: Array) -> float:
    """Mean over the rows, by loops."""
    rows = [
        sum(p * math.log(p / q) for p, q in zip(one, two, strict=True)) for one, two in zip(of, around, strict=True)
    ]
    return sum(rows) / len(rows)


def gradient(name: str, temperature: float, student: Tensor = STUDENT) -> Tensor:
    leaf = student.clone().requires_grad_(True)
    getattr(losses, name)(leaf, TEACHER, temperature=temperature).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_by_hand(temperature: float) -> None:
    expected = temperature**2 * kl(soft(TEACHER, temperature), soft(STUDENT, temperature))
    assert float(losses.kd(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.kd(STUDENT, TEACHER)) == float(losses.kd(STUDENT, TEACHER, temperature=4.0))


def test_kd_of_tokens_is_the_mean_over_tokens() -> None:
    student, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    tokens = [losses.kd(student[row, at][None], teacher[row, at][None]) for row in range(2) for at in range(3)]
    assert float(losses.kd(student, teacher)) == pytest.approx(float(torch.stack(tokens).mean()), rel=1e-5)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    some = torch.stack([tokens[0], tokens[1], tokens[5]]).mean()
    assert float(losses.kd(student, teacher, mask=mask)) == pytest.approx(float(some), rel=1e-5)


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "jsd", "dist"])
def test_a_constant_added_to_all_logits_changes_nothing(name: str) -> None:
    loss = getattr(losses, name)
    assert float(loss(STUDENT + 50, TEACHER)) == pytest.approx(float(loss(STUDENT, TEACHER)), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0, 64.0])
def test_the_gradient_of_kd_is_t_times_the_difference_of_soft_probabilities(temperature: float) -> None:
    difference = torch.softmax(STUDENT / temperature, 1) - torch.softmax(TEACHER / temperature, 1)
    assert torch.allclose(gradient("kd", temperature), temperature * difference / len(STUDENT), atol=1e-5)


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "jsd", "logit_standardisation"])
def test_the_size_of_the_gradient_does_not_depend_on_the_temperature(name: str) -> None:
    """Without the factor T² it would fall by 1/16 from T = 16 to 64."""
    sizes = {temperature: float(gradient(name, temperature).norm()) for temperature in (4.0, 16.0, 64.0, 256.0)}
    assert sizes[64.0] == pytest.approx(sizes[16.0], rel=0.15)
    assert sizes[256.0] == pytest.approx(sizes[64.0], rel=0.05)
    assert 0.4 < sizes[4.0] / sizes[64.0] < 2.5


def test_the_balance_of_kd_holds_over_usual_temperatures() -> None:
    student = STUDENT / 3
    kept = [float(gradient("kd", t, student).norm()) for t in (1.0, 2.0, 4.0, 8.0, 16.0)]
    bare = [size / t**2 for size, t in zip(kept, (1, 2, 4, 8, 16), strict=True)]
    assert max(kept) / min(kept) < 3
    assert bare[0] / bare[-1] > 80


def test_a_hot_kd_compares_centred_logits() -> None:
    centred = (STUDENT - TEACHER) - (STUDENT - TEACHER).mean(1, keepdim=True)
    assert torch.allclose(gradient("kd", 1000.0), centred / centred.numel(), atol=1e-3)  # Hinton et al. 2015, eq. 4


def test_mse_by_hand() -> None:
    expected = float(((STUDENT - TEACHER) ** 2).mean())
    assert float(losses.mse(STUDENT, TEACHER)) == pytest.approx(expected, rel=1e-6)
    assert float(losses.mse(STUDENT[:, 0], TEACHER[:, 0])) == pytest.approx(
        float(((STUDENT - TEACHER)[:, 0] ** 2).mean()), rel=1e-6
    )
    mask = torch.zeros(2, 4)
    mask[0, 1] = mask[1, 3] = 1
    some = torch.cat([(STUDENT - TEACHER)[1], (STUDENT - TEACHER)[7]]).square().mean()
    masked = losses.mse(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10), mask=mask)
    assert float(masked) == pytest.approx(float(some), rel=1e-6)


def test_logit_standardisation_by_hand() -> None:
    def z(logits: Tensor) -> Tensor:
        rows = logits.double().numpy()
        return torch.from_numpy((rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True))

    expected = 2.0**2 * kl(soft(z(TEACHER), 2.0), soft(z(STUDENT), 2.0))
    assert float(losses.logit_standardisation(STUDENT, TEACHER)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 100), st.floats(-30, 30))
def test_logit_standardisation_sees_neither_scale_nor_offset(scale: float, offset: float) -> None:
    plain = float(losses.logit_standardisation(STUDENT, TEACHER))
    assert float(losses.logit_standardisation(scale * STUDENT + offset, TEACHER)) == pytest.approx(plain, rel=2e-2)
    assert float(losses.logit_standardisation(scale * TEACHER + offset, TEACHER)) == pytest.approx(0, abs=1e-3)
    assert float(losses.kd(2 * TEACHER, TEACHER)) > 0.1


def test_dkd_by_hand() -> None:
    labels, alpha, beta, temperature = integers(10, 8), 0.7, 3.0, 2.0
    target = others = 0.0
    for row, y in enumerate(labels.tolist()):
        p, q = soft(TEACHER[row], temperature), soft(STUDENT[row], temperature)
        target += p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        rest = [at for at in range(10) if at != y]
        p, q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        others += sum(p * np.log(p / q))
    expected = temperature**2 * (alpha * target + beta * others) / 8
    value = losses.dkd(STUDENT, TEACHER, labels=labels, alpha=alpha, beta=beta, temperature=temperature)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_kd_is_a_dkd_whose_second_weight_is_the_teachers_doubt() -> None:
    """Zhao et al. 2022, equation 7, example by example."""
    labels = integers(10, 8)
    for row in range(8):
        one, other, label = STUDENT[row : row + 1], TEACHER[row : row + 1], labels[row : row + 1]
        doubt = 1 - float(torch.softmax(other / 4, 1)[0, label])
        value = losses.dkd(one, other, labels=label, alpha=1.0, beta=doubt)
        assert float(value) == pytest.approx(float(losses.kd(one, other)), rel=1e-4)


def test_dkd_reads_labels_only_where_the_mask_counts() -> None:
    student, teacher, mask = STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10), torch.zeros(2, 4)
    mask[:, :2] = 1
    labels = integers(10, 2, 4)
    expected = losses.dkd(student[:, :2], teacher[:, :2], labels=labels[:, :2])
    padded = torch.where(mask == 1, labels, -100)
    assert float(losses.dkd(student, teacher, labels=padded, mask=mask)) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(DataError, match=r"0\.\.9, got -100"):
        losses.dkd(student, teacher, labels=padded)


def test_dkd_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"integer labels of shape \(8,\), got torch.int64 of shape \(7,\)"):
        losses.dkd(STUDENT, TEACHER, labels=integers(10, 7))
    with pytest.raises(DataError, match="integer labels"):
        losses.dkd(STUDENT, TEACHER, labels=normal(8))
    with pytest.raises(DataError, match=r"0\.\.9, got 10\.\.10"):
        losses.dkd(STUDENT, TEACHER, labels=torch.full((8,), 10))
    with pytest.raises(ConfigError, match="two classes"):
        losses.dkd(STUDENT[:, :1], TEACHER[:, :1], labels=torch.zeros(8, dtype=torch.int64))


def test_dist_by_hand() -> None:
    student, teacher = soft(STUDENT, 2.0), soft(TEACHER, 2.0)
    inter = np.mean([1 - np.corrcoef(one, two)[0, 1] for one, two in zip(student, teacher, strict=True)])
    intra = np.mean([1 - np.corrcoef(one, two)[0, 1] for one, two in zip(student.T, teacher.T, strict=True)])
    value = losses.dist(STUDENT, TEACHER, beta=0.5, gamma=3.0, temperature=2.0)
    assert float(value) == pytest.approx(0.5 * inter + 3 * intra, rel=1e-5)


def test_dist_leaves_out_what_is_constant() -> None:
    assert float(losses.dist(STUDENT[:1], TEACHER[:1], beta=0.0)) == 0  # a batch of one has no intra-class relation
    student = torch.cat([torch.full((1, 10), 3.0), STUDENT[1:]])
    rest = float(losses.dist(STUDENT[1:], TEACHER[1:], gamma=0.0))
    assert float(losses.dist(student, TEACHER, gamma=0.0)) == pytest.approx(rest * 7 / 8, rel=1e-5)


def test_dist_allows_a_student_that_is_less_sure() -> None:
    """Probabilities that are mixed with the uniform distribution keep every correlation within an example."""
    teacher = torch.softmax(TEACHER, 1)
    unsure = (0.3 * teacher + 0.7 / 10).log()
    assert float(losses.dist(unsure, TEACHER)) == pytest.approx(0, abs=1e-4)
    assert float(losses.kd(unsure, TEACHER, temperature=1.0)) > 0.1


def test_reverse_kl_by_hand() -> None:
    expected = 9 * kl(soft(STUDENT, 3.0), soft(TEACHER, 3.0))
    assert float(losses.reverse_kl(STUDENT, TEACHER, temperature=3.0)) == pytest.approx(expected, rel=1e-5)
    swapped = losses.kd(TEACHER, STUDENT, temperature=3.0)
    assert float(losses.reverse_kl(STUDENT, TEACHER, temperature=3.0)) == pytest.approx(float(swapped), rel=1e-5)


def test_reverse_kl_prefers_one_mode_to_the_middle() -> None:
    teacher = torch.tensor([[0.49, 0.02, 0.49]]).log()
    one_mode, middle = torch.tensor([[0.96, 0.02, 0.02]]).log(), torch.tensor([[0.3, 0.4, 0.3]]).log()
    assert losses.reverse_kl(one_mode, teacher) < losses.reverse_kl(middle, teacher)
    assert losses.kd(one_mode, teacher, temperature=1.0) > losses.kd(middle, teacher, temperature=1.0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_by_hand(beta: float) -> None:
    student, teacher = soft(STUDENT, 2.0), soft(TEACHER, 2.0)
    mixture = beta * teacher + (1 - beta) * student
    expected = 4 * (beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture))
    assert float(losses.jsd(STUDENT, TEACHER, beta=beta, temperature=2.0)) == pytest.approx(expected, rel=1e-5)


def test_jsd_lies_between_kd_and_reverse_kl() -> None:
    student, teacher = normal(8, 10).double(), normal(8, 10, seed=1).double()
    forward, reverse = losses.kd(student, teacher, temperature=1.0), losses.reverse_kl(student, teacher)
    assert float(losses.jsd(student, teacher, beta=1e-5)) / 1e-5 == pytest.approx(float(forward), rel=1e-3)
    assert float(losses.jsd(student, teacher, beta=1 - 1e-5)) / 1e-5 == pytest.approx(float(reverse), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.1, 1000))
def test_jsd_is_bounded_and_symmetric_in_the_middle(seed: int, beta: float, scale: float) -> None:
    student, teacher = scale * normal(4, 6, seed=seed), scale * normal(4, 6, seed=seed + 1)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert -1e-5 < float(losses.jsd(student, teacher, beta=beta)) < entropy + 1e-5
    swapped = float(losses.jsd(teacher, student, beta=1 - beta))
    assert float(losses.jsd(student, teacher, beta=beta)) == pytest.approx(swapped, abs=1e-5)


@pytest.mark.parametrize("name", ["kd", "logit_standardisation", "dist", "reverse_kl", "jsd", "mse"])
def test_logits_of_different_shapes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} needs the same shape .* \(8, 10\) and \(8, 9\)"):
        getattr(losses, name)(STUDENT, TEACHER[:, :9])


@pytest.mark.parametrize("name", ["kd", "logit_standardisation", "dist", "reverse_kl", "jsd"])
def test_logits_need_a_class_dimension(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} needs logits"):
        getattr(losses, name)(STUDENT[0], TEACHER[0])
