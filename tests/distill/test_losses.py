from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor.distill import losses
from zoo import normal

STUDENT, TEACHER = 3 * normal(8, 10), 3 * normal(8, 10, seed=1)


def gradient(temperature: float, student: Tensor = STUDENT) -> Tensor:
    leaf = student.clone().requires_grad_(True)
    losses.kd(leaf, TEACHER, temperature).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_by_hand(temperature: float) -> None:
    def soft(logits: Tensor) -> np.ndarray:
        powers = np.exp(logits.double().numpy() / temperature)
        return powers / powers.sum(1, keepdims=True)

    student, teacher = soft(STUDENT), soft(TEACHER)
    divergence = (teacher * np.log(teacher / student)).sum(1).mean()
    assert float(losses.kd(STUDENT, TEACHER, temperature)) == pytest.approx(temperature**2 * divergence, rel=1e-5)


def test_kd_of_tokens_is_the_mean_over_tokens() -> None:
    student, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    tokens = [losses.kd(student[row, at][None], teacher[row, at][None], 2.0) for row in range(2) for at in range(3)]
    assert float(losses.kd(student, teacher, 2.0)) == pytest.approx(float(torch.stack(tokens).mean()), rel=1e-5)


@pytest.mark.parametrize("name", losses.__all__)
def test_a_loss_is_zero_only_where_student_and_teacher_agree(name: str) -> None:
    loss = getattr(losses, name)
    assert float(loss(TEACHER, TEACHER, 3.0)) == pytest.approx(0, abs=1e-5)
    assert float(loss(STUDENT, TEACHER, 3.0)) > 0.1


def test_kd_does_not_see_a_constant_added_to_all_logits() -> None:
    assert float(losses.kd(STUDENT + 50, TEACHER, 2.0)) == pytest.approx(
        float(losses.kd(STUDENT, TEACHER, 2.0)), rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0, 64.0])
def test_the_gradient_is_t_times_the_difference_of_soft_probabilities(temperature: float) -> None:
    difference = torch.softmax(STUDENT / temperature, 1) - torch.softmax(TEACHER / temperature, 1)
    assert torch.allclose(gradient(temperature), temperature * difference / len(STUDENT), atol=1e-5)


def test_the_size_of_the_gradient_does_not_depend_on_the_temperature() -> None:
    """Without the factor T² it would fall by 1/16 from T = 16 to 64, and by 1/256 from T = 4 to 64."""
    sizes = {temperature: float(gradient(temperature).norm()) for temperature in (4.0, 16.0, 64.0, 256.0)}
    assert sizes[64.0] == pytest.approx(sizes[16.0], rel=0.1)
    assert sizes[256.0] == pytest.approx(sizes[64.0], rel=0.03)
    assert 0.4 < sizes[4.0] / sizes[64.0] < 2.5
    centred = (STUDENT - TEACHER) - (STUDENT - TEACHER).mean(1, keepdim=True)
    assert torch.allclose(gradient(1000.0), centred / centred.numel(), atol=1e-3)  # Hinton et al. 2015, equation 4


def test_mse_by_hand() -> None:
    assert float(losses.mse(STUDENT, TEACHER, 4.0)) == pytest.approx(float(((STUDENT - TEACHER) ** 2).mean()), rel=1e-6)
    assert float(losses.mse(STUDENT, TEACHER, 1.0)) == float(losses.mse(STUDENT, TEACHER, 9.0))


@pytest.mark.parametrize("name", losses.__all__)
def test_extreme_logits_stay_finite(name: str) -> None:
    loss = getattr(losses, name)
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), 1.0)
    value.backward()
    assert bool(torch.isfinite(value))
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
