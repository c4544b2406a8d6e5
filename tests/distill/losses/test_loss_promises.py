"""What every distillation loss promises, whatever its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.distill.losses import LOSSES, Kind
from tersor.distill.losses.crd import Crd
from tersor.errors import DataError
from zoo import integers, normal, seeded

Loss = Callable[..., Tensor]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
LARGEST = 1e3
MASKED = sorted(name for name, kind in LOSSES.items() if kind.takes_mask)
SHAPES = {"attention_maps": (4, 2, 5, 5), "attention_transfer": (4, 6, 5, 3)}
# A contrast is never free of loss: the others stay where they are.
ZERO_AT_TEACHER = sorted(set(LOSSES) - {"crd"})


def specimen(name: str, seed: int, scale: float = 1.0) -> Tensor:
    """Features or logits of four examples of five tokens, of width six."""
    return scale * normal(*SHAPES.get(name, (4, 5, 6)), seed=seed)


def number(loss: Tensor) -> float:
    return float(loss.detach())


def made(name: str) -> Loss:
    """The loss as the caller would hold it, with labels and settings that it cannot do without."""
    kind: Kind = LOSSES[name]
    given: dict[str, Any] = {"heads": 2} if name == "minilm_relations" else {}
    if kind.needs_labels:
        given["labels"] = integers(6, 4, 5)
    function: Loss = seeded(lambda: Crd(6, 6)) if kind.trainable else kind.function

    def loss(student: Tensor, teacher: Tensor, **more: Any) -> Tensor:
        return function(student, teacher, **given, **more)

    return loss


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_scalar_of_float32_with_a_gradient_for_the_student_alone(name: str) -> None:
    student, teacher = specimen(name, 0).requires_grad_(True), specimen(name, 1).requires_grad_(True)
    value = made(name)(student, teacher)
    value.backward()
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert value.item() > 0
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.norm()) > 0


@pytest.mark.parametrize("name", ZERO_AT_TEACHER)
def test_zero_without_a_gradient_where_student_and_teacher_agree(name: str) -> None:
    student = specimen(name, 1).requires_grad_(True)
    value = made(name)(student, specimen(name, 1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-5
    assert number(made(name)(specimen(name, 0), specimen(name, 1))) > 0.01


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_step_against_the_gradient_lowers_it(name: str) -> None:
    student, teacher, loss = specimen(name, 0).requires_grad_(True), specimen(name, 1), made(name)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert number(loss(student - 0.01 * gradient / gradient.norm(), teacher)) < value.item()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"crd"}))  # which has weights of float32
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    student, teacher = specimen(name, 0).double().requires_grad_(True), specimen(name, 1).double()
    assert torch.autograd.gradcheck(lambda s: made(name)(s, teacher), (student,))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_floats_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = specimen(name, 0).to(dtype).requires_grad_(True), specimen(name, 1).to(dtype)
    expected = made(name)(student.detach().float(), teacher.float())
    value = made(name)(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None
    assert student.grad.dtype == dtype
    mixed = made(name)(student.detach().float(), teacher)
    assert number(mixed) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_autocast_does_not_reach_in(name: str) -> None:
    student, teacher = specimen(name, 0), specimen(name, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made(name)(student, teacher)
    assert inside.dtype == torch.float32
    assert number(inside) == number(made(name)(student, teacher))


def degenerate(name: str, how: str, seed: int) -> Tensor:
    features = specimen(name, seed)
    match how:
        case "zeros":
            return torch.zeros_like(features)
        case "constant":
            return torch.full_like(features, 0.1)
        case "equal examples":
            return features[:1].expand_as(features).clone()
        case "equal channels":
            return features[..., :1].expand_as(features).clone()
        case "one dead example":
            features[0] = 0
            return features
        case "tiny":
            return 1e-30 * features
        case "huge":
            return 1e8 * features
    raise AssertionError(how)


HOW = ["zeros", "constant", "equal examples", "equal channels", "one dead example", "tiny", "huge"]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("student_is", HOW)
def test_degenerate_tensors_give_finite_values_and_gradients(name: str, student_is: str) -> None:
    for teacher_is in HOW:
        student = degenerate(name, student_is, 0).requires_grad_(True)
        value = made(name)(student, degenerate(name, teacher_is, 1))
        value.backward()
        assert bool(torch.isfinite(value)), teacher_is
        assert value.item() > -1e-4, teacher_is
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all()), teacher_is
        if student_is in ("zeros", "constant", "one dead example") and teacher_is != "huge":
            assert float(student.grad.abs().max()) < LARGEST, teacher_is  # usable, not only finite


@pytest.mark.parametrize("name", ZERO_AT_TEACHER)
@pytest.mark.parametrize("both", HOW)
def test_degenerate_tensors_that_agree_cost_nothing(name: str, both: str) -> None:
    student = degenerate(name, both, 0).requires_grad_(True)
    value = made(name)(student, degenerate(name, both, 0))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"attention_maps", "attention_transfer", "minilm_relations"}))
def test_a_batch_of_one_vector(name: str) -> None:
    kind = LOSSES[name]
    labels = {"labels": integers(6, 1)} if kind.needs_labels else {}
    function: Loss = seeded(lambda: Crd(6, 6)) if kind.trainable else kind.function
    student = normal(1, 6).requires_grad_(True)
    value = function(student, normal(1, 6, seed=1), **labels)
    value.backward()
    assert bool(torch.isfinite(value))
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def spoilt(name: str, features: Tensor, content: float) -> Tensor:
    """With something else where the mask says padding."""
    if name == "attention_maps":
        both = (MASK[:, None, :, None] * MASK[:, None, None, :]).bool()
        return torch.where(both, features, content)
    return torch.where(MASK[..., None].bool(), features, content)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("content", [0.0, 1e4, float("nan")])
def test_padded_content_changes_neither_value_nor_gradient(name: str, content: float) -> None:
    loss = made(name)

    def run(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        leaf = student.clone().requires_grad_(True)
        value = loss(leaf, teacher, mask=MASK)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad

    student, teacher = specimen(name, 0), specimen(name, 1)
    value, gradient = run(student, teacher)
    other, other_gradient = run(spoilt(name, student, content), spoilt(name, teacher, content))
    assert other == value
    assert torch.equal(gradient, other_gradient)
    assert torch.equal(spoilt(name, gradient, 0.0), gradient)
    assert number(loss(student, teacher)) != pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_ones_is_no_mask(name: str) -> None:
    student, teacher, loss = specimen(name, 0), specimen(name, 1), made(name)
    plain = number(loss(student, teacher))
    for ones in (torch.ones(4, 5), torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5, dtype=torch.bool)):
        assert number(loss(student, teacher, mask=ones)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_where_nothing_counts_there_is_no_gradient(name: str) -> None:
    student = specimen(name, 0).requires_grad_(True)
    value = made(name)(student, specimen(name, 1), mask=torch.zeros(4, 5))
    value.backward()
    assert bool(torch.isfinite(value))
    assert student.grad is not None
    assert float(student.grad.abs().max()) == 0


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: expected a mask of shape \(4, 5\), .* got \(4, 6\)"):
        made(name)(specimen(name, 0), specimen(name, 1), mask=torch.ones(4, 6))


@pytest.mark.parametrize("name", sorted(name for name, kind in LOSSES.items() if kind.on == "outputs"))
def test_extreme_logits_stay_finite(name: str) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 1e4]], requires_grad=True)
    labels = {"labels": torch.tensor([1, 2])} if LOSSES[name].needs_labels else {}
    value = LOSSES[name].function(student, torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, 0.0]]), **labels)
    value.backward()
    assert bool(torch.isfinite(value))
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
