from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tersor.distill.projectors import projector
from tersor.errors import ConfigError
from zoo import normal

Shape = tuple[int, ...]


def projected(student: Tensor, teacher: Tensor, channels_first: bool | None = None) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = projector(student.shape, teacher.shape, channels_first=channels_first)
    low, high = module(student, teacher)
    assert low.shape == high.shape
    return low, high


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 5, 4, 4), (2, 5, 3, 3, 3)])
def test_equal_shapes_stay(shape: Shape) -> None:
    module = projector(shape, shape)
    assert list(module.parameters()) == []
    student, teacher = normal(*shape), normal(*shape, seed=1)
    assert module(student, teacher)[0] is student
    assert module(student, teacher)[1] is teacher


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "count"),
    [
        ((2, 5), (2, 7), nn.Linear, 5 * 7 + 7),
        ((2, 3, 5), (2, 3, 7), nn.Linear, 5 * 7 + 7),
        ((2, 5, 3), (2, 7, 3), nn.Conv1d, 5 * 7 + 7),
        ((2, 5, 4, 4), (2, 7, 4, 4), nn.Conv2d, 5 * 7 + 7),
        ((2, 5, 4, 4, 4), (2, 7, 4, 4, 4), nn.Conv3d, 5 * 7 + 7),
    ],
)
def test_the_student_gets_the_teachers_width(student: Shape, teacher: Shape, kind: type, count: int) -> None:
    module = projector(student, teacher)
    assert type(module.map) is kind
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    low, high = normal(*student).requires_grad_(), normal(*teacher)
    found, same = module(low, high)
    assert found.shape == high.shape
    assert same is high
    functional.mse_loss(found, same).backward()
    assert all(float(tensor.grad.abs().sum()) > 0 for tensor in (low, *module.parameters()))


def test_one_position_is_mapped_like_a_linear_layer() -> None:
    module = projector((2, 5, 4, 4), (2, 7, 4, 4))
    features = normal(2, 5, 4, 4)
    weight, bias = module.map.weight, module.map.bias
    by_hand = torch.einsum("bchw,oc->bohw", features, weight[:, :, 0, 0]) + bias[:, None, None]
    assert torch.allclose(module(features, normal(2, 7, 4, 4))[0], by_hand, atol=1e-6)


def test_the_larger_map_is_averaged_whosever_it_is() -> None:
    small, large = normal(2, 5, 4, 4), normal(2, 5, 8, 8)
    means = large.reshape(2, 5, 4, 2, 4, 2).mean((3, 5))
    low, high = projected(small, large)
    assert low is small
    assert torch.allclose(high, means, atol=1e-6)
    low, high = projected(large, small)
    assert torch.allclose(low, means, atol=1e-6)
    assert high is small
    low, high = projected(normal(2, 5, 8, 3), normal(2, 5, 4, 6))
    assert low.shape == (2, 5, 4, 3)


def test_sizes_may_change_from_batch_to_batch() -> None:
    module = projector((2, 5, 8, 8), (2, 7, 8, 8))
    for batch, student, teacher in ((3, 6, 6), (1, 4, 8), (2, 9, 2)):
        low, high = module(normal(batch, 5, student, student), normal(batch, 7, teacher, teacher))
        assert low.shape == high.shape == (batch, 7, min(student, teacher), min(student, teacher))
    tokens = projector((2, 4, 5), (2, 4, 7))
    assert tokens(normal(3, 9, 5), normal(3, 9, 7))[0].shape == (3, 9, 7)
    with pytest.raises(ConfigError, match=r"as many tokens .* \[B, 9, 5\] and \[B, 8, 7\]"):
        tokens(normal(3, 9, 5), normal(3, 8, 7))


def test_three_dimensions_can_be_told() -> None:
    low, _ = projected(normal(2, 5, 8), normal(2, 7, 4), channels_first=True)
    assert low.shape == (2, 7, 4)
    assert type(projector((2, 4, 5), (2, 4, 7), channels_first=False).map) is nn.Linear
    low, _ = projected(normal(2, 5, 8), normal(2, 5, 4), channels_first=True)
    assert low.shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "told", "message"),
    [
        ((2, 5), (2, 5, 4, 4), None, r"two shapes of one kind.*\[B, 5\] of the student and \[B, 5, 4, 4\]"),
        ((2, 4, 5), (2, 5, 4, 4), None, "two shapes of one kind"),
        ((2,), (2,), None, "two shapes of one kind"),
        ((2,) * 6, (2,) * 6, None, "two shapes of one kind"),
        ((2, 4, 5), (2, 6, 7), None, r"agree in no dimension.*channels_first=True"),
        ((2, 4, 5), (2, 6, 5), False, r"as many tokens .* \[B, 4, 5\] and \[B, 6, 5\]"),
        ((2, 5), (2, 6), True, "does not fit"),
        ((2, 5, 4, 4), (2, 5, 4, 4), False, "does not fit"),
    ],
)
def test_what_cannot_be_compared_is_refused(student: Shape, teacher: Shape, told: bool | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        projector(student, teacher, channels_first=told)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=3),
)
def test_any_two_maps_become_comparable(widths: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    student = normal(2, widths[0], *(pair[0] for pair in sizes))
    teacher = normal(2, widths[1], *(pair[1] for pair in sizes))
    low, high = projected(student, teacher)
    assert low.shape == (2, widths[1], *(min(pair) for pair in sizes))
    assert float(teacher.min()) - 1e-6 <= float(high.min()) <= float(high.max()) <= float(teacher.max()) + 1e-6
    assert (high is teacher) == all(ours >= theirs for ours, theirs in sizes)
