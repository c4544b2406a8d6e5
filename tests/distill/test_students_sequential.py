from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tersor.distill.students import family, scaled
from tersor.errors import ConfigError, ModelError
from zoo import normal, seeded


def conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def images() -> nn.Sequential:
    """A nest with repeated parts, pooling, and a linear layer behind a Flatten; `[B, 3, 8, 8]`."""
    return nn.Sequential(
        nn.BatchNorm2d(3), conv(3, 16), conv(16, 16), conv(16, 16), conv(16, 16), conv(16, 16), nn.MaxPool2d(2),
        conv(16, 64), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.GroupNorm(8, 64), nn.PReLU(64), nn.Flatten(),
        nn.BatchNorm1d(1024), nn.Linear(1024, 40), nn.LayerNorm(40), nn.GELU(), nn.Dropout(0.1), nn.Linear(40, 5),
    )  # fmt: skip


def flat() -> nn.Sequential:
    """Repeated in turn: linear, ReLU; `[B, 12]`."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), *layers, nn.Linear(16, 4))


def unpadded() -> nn.Sequential:
    """Convolutions that shrink the image cannot go: the linear layer counts pixels; `[B, 3, 8, 8]`."""
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 5))


def sizes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(module.weight.shape[:2]) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("build", "x"), [(images, normal(4, 3, 8, 8)), (flat, normal(4, 12))])
@pytest.mark.parametrize(("width", "depth"), [(0.5, 1.0), (1.0, 0.5), (0.3, 0.3)])
def test_students_run_and_train(build: Callable[[], nn.Sequential], x: Tensor, width: float, depth: float) -> None:
    teacher = seeded(build).requires_grad_(False)
    student = scaled(teacher, width=width, depth=depth)
    assert student(x).shape == teacher(x).shape
    assert count(student) < count(teacher)
    student.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_inner_widths_scale_and_ends_stay() -> None:
    student = scaled(images(), width=0.5)
    assert sizes(student) == [(8, 3), *[(8, 8)] * 4, (32, 8), (32, 1), (20, 512), (5, 20)]
    assert [m.num_features for m in student.modules() if isinstance(m, nn.BatchNorm2d)] == [3, *[8] * 5, 32]
    assert student[8].groups == 32


def test_repeated_parts_become_fewer() -> None:
    assert sizes(scaled(images(), depth=0.5))[:4] == [(16, 3), (16, 16), (16, 16), (64, 16)]
    assert sizes(scaled(flat(), depth=0.5)) == [(16, 12), (16, 16), (16, 16), (4, 16)]
    assert sizes(scaled(flat(), depth=0.01)) == [(16, 12), (16, 16), (4, 16)]


def test_all_of_it_is_the_same_architecture_with_other_weights() -> None:
    teacher = seeded(images)
    student = scaled(teacher, seed=1)
    assert repr(student) == repr(teacher)
    assert not torch.equal(student[1][0].weight, teacher[1][0].weight)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (scaled(flat(), width=0.5, seed=seed)[0].weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_type_and_mode_are_the_teachers() -> None:
    student = scaled(seeded(flat).double(), width=0.5)
    assert student[0].weight.dtype == torch.float64
    assert not student.training


def test_a_family_is_ordered_and_counted_without_building() -> None:
    members = family(flat(), widths=(0.5, 1.0), depths=(1.0, 0.5))
    assert [label for label, _, _ in members] == [
        "width 1, depth 1", "width 1, depth 0.5", "width 0.5, depth 1", "width 0.5, depth 0.5",
    ]  # fmt: skip
    assert [parameters for _, parameters, _ in members] == [count(build()) for _, _, build in members]
    assert members[3].build() is not members[3].build()


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (unpadded(), {"depth": 0.5}, "depth 0.5 of Sequential is the teacher itself"),
        (flat(), {"width": 0.999}, "width 0.999 of Sequential is the teacher itself"),
        (flat(), {"width": 0}, r"width: expected a share in \(0, 1\], got 0"),
        (flat(), {"depth": 1.5}, r"depth: expected a share in \(0, 1\], got 1.5"),
        (flat(), {"width": float("nan")}, "width: expected a share"),
    ],
)
def test_shares_that_mean_nothing_are_refused(teacher: nn.Sequential, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled(teacher, **settings)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (nn.Sequential(nn.LSTM(4, 4)), "'0' is LSTM; a nest of nn.Sequential scales if"),
        (nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)), "'1' is GLU"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "has no layer with weights"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "groups of several channels"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=8)), "is the last layer"),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 2)), "'1' is Unflatten"),
        (nn.Sequential(nn.Linear(4, 6), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 2)), "takes 4 features, but 6"),
        (nn.Bilinear(2, 2, 2), "Bilinear: expected a Hugging Face model or a nest"),
    ],
)
def test_other_networks_are_refused_with_what_else_to_do(teacher: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scaled(teacher, width=0.5)


def test_a_family_needs_shares() -> None:
    with pytest.raises(ConfigError, match="widths, depths: expected at least one"):
        family(flat(), widths=())
