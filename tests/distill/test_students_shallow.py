from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.surgery import Surgery
from tersor.distill.students import Student, every_kth
from tersor.distill.students.sizes import spread
from tersor.errors import ConfigError, ModelError
from tersor.graph import apply_surgery
from zoo import normal, seeded


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1)
        self.way = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.way(x) + self.second(functional.relu(self.norm(self.first(x)))))


class Stages(nn.Module):
    """Two stages, of 6 and 4 blocks; images `[B, 3, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(*(Residual(8, 8) for _ in range(6)))
        self.two = nn.Sequential(Residual(8, 12, 2), *(Residual(12, 12) for _ in range(3)))
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(image))).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.width = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.layer_idx + 1) * self.width(x)


class Counted(nn.Module):
    """Six layers that know their number, run by a count; `[B, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_layers = 6
        self.layers = nn.ModuleList(Layer(number) for number in range(6))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.num_layers):
            x = self.layers[number](x)
        return torch.cat([head(x) for head in self.heads], 1)


class Mixed(nn.Module):
    """Layers of one class, of which some have their number elsewhere."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.add_module(kind, Layer(number))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


class Hybrid(nn.Module):
    """Plain layers, then two kinds in turns; `[B, 6]`."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ("scan", "scan", "scan", "attention", "scan", "scan")
        self.layers = nn.ModuleList(
            [*(Layer(n) for n in range(3)), *(Mixed(n + 3, kind) for n, kind in enumerate(kinds))]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Parallel(nn.Module):
    """Six branches side by side, whose answers are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Layer(number) for number in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def alone(student: Student, teacher: nn.Module) -> bool:
    ours = {tensor.data_ptr() for tensor in student.module.state_dict().values()}
    return not ours & {tensor.data_ptr() for tensor in teacher.state_dict().values()}


def test_spread_is_that_of_distilbert_and_of_shrink_and_fine_tune() -> None:
    assert spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread(12, 3) == [0, 6, 11]
    assert spread(12, 1) == [0]


@given(st.integers(1, 60).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
@settings(deadline=None)
def test_spread_is_even(sizes: tuple[int, int]) -> None:
    count, kept = sizes
    found = spread(count, kept)
    assert len(found) == kept
    assert found[0] == 0
    assert found == sorted(set(found))
    if kept > 1:
        steps = {after - before for before, after in pairwise(found)}
        assert found[-1] == count - 1
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("keep", "expected"), [("spread", (0, 3, 5)), ("first", (0, 1, 2)), ("last", (3, 4, 5))])
def test_lists_are_shortened_counted_and_numbered_anew(keep: str, expected: tuple[int, ...]) -> None:
    teacher, x = seeded(Counted), normal(4, 6)
    student = every_kth(teacher, layers=3, keep=keep)  # type: ignore[arg-type]
    assert student.layers == {"layers": expected}
    assert student.module.num_layers == len(student.module.layers) == 3
    assert [layer.layer_idx for layer in student.module.layers] == [0, 1, 2]
    assert len(student.module.heads) == 6
    wanted = x
    for number, origin in enumerate(expected):
        wanted = wanted + (number + 1) * teacher.layers[origin].width(wanted)
    torch.testing.assert_close(student.module(x), torch.cat([head(wanted) for head in teacher.heads], 1))


def test_stages_shrink_in_proportion_and_what_changes_the_shape_stays() -> None:
    teacher, x = seeded(Stages), normal(2, 3, 8, 8)
    student = every_kth(teacher, layers=3, example_inputs=x)
    assert student.layers == {"one": (0, 3, 5), "two": (0, 3)}
    wanted = teacher.stem(x)
    for block in (teacher.one[0], teacher.one[3], teacher.one[5], teacher.two[0], teacher.two[3]):
        wanted = block(wanted)
    assert torch.equal(student.module(x), teacher.head(wanted.mean((2, 3))))
    assert every_kth(teacher, layers=2, keep="last").layers == {"one": (4, 5), "two": (0,)}
    assert every_kth(teacher, layers=2, keep="last", path="two").layers == {"two": (0, 3)}
    with pytest.raises(ConfigError, match=r"\[0\] of 'two' must stay"):
        every_kth(teacher, layers=[1, 2], path="two")


@pytest.mark.parametrize("build", [Counted, Stages])
def test_the_surgery_makes_the_same_of_the_teachers_class(build: Callable[[], nn.Module]) -> None:
    student = every_kth(seeded(build), layers=2)
    assert student.surgery is not None
    fresh = apply_surgery(seeded(build, seed=1), Surgery.from_json(student.surgery.to_json()))
    fresh.load_state_dict(student.module.state_dict())
    x = normal(2, 6) if build is Counted else normal(2, 3, 8, 8)
    assert torch.equal(fresh(x), student.module(x))


def test_several_rows_in_one_list_with_numbers_in_different_places() -> None:
    teacher = seeded(Hybrid)
    student = every_kth(teacher, layers=3, keep="last")
    assert student.layers == {"layers": (1, 2, 6, 7, 8)}
    inner = [
        next((part for part in layer.children() if isinstance(part, Layer)), layer) for layer in student.module.layers
    ]
    assert [layer.layer_idx for layer in inner] == [0, 1, 2, 3, 4]
    assert student.surgery is None, "no surgery could say that"
    assert [layer.layer_idx for layer in teacher.layers[:3]] == [0, 1, 2]


def test_lists_inside_layers_of_others_are_refused() -> None:
    teacher = seeded(
        lambda: nn.ModuleDict({"outer": nn.Sequential(*(nn.Sequential(Layer(0), Layer(0)) for _ in "ab"))})
    )
    assert every_kth(teacher, layers=1).layers == {"outer": (0,)}
    assert every_kth(teacher, layers=1, path="outer.1").layers == {"outer.1": (0,)}
    with pytest.raises(ConfigError, match=r"path: 'outer\.0' is inside a layer of another list"):
        every_kth(teacher, layers=1, path=["outer", "outer.0"])


def test_a_named_list_must_repeat() -> None:
    teacher = seeded(lambda: nn.ModuleDict({"a": nn.Sequential(Layer(0), Layer(0)), "b": nn.Sequential(Layer(0))}))
    with pytest.raises(ModelError, match=r"no repeated blocks in \['b'\]"):
        every_kth(teacher, layers=1, path=["a", "b"])


def test_the_teacher_is_neither_changed_nor_shared(noticed: Callable[[nn.Module], str]) -> None:
    teacher = seeded(Stages).requires_grad_(False)
    before = noticed(teacher)
    student = every_kth(teacher, layers=2, example_inputs=normal(2, 3, 8, 8))
    with torch.no_grad():
        for parameter in student.module.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert noticed(teacher) == before
    assert alone(student, teacher)
    assert not student.module.training


def test_a_chain_of_named_modules_with_others_around() -> None:
    class Named(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 6)
            for letter in "abcd":
                self.add_module(letter, Layer(0))
            self.head = nn.Linear(6, 2)

    teacher, x = seeded(Named), normal(3, 6)
    student = every_kth(teacher, layers=2)
    assert student.layers == {"": (1, 4)}
    assert torch.equal(student.module(x), teacher.head(teacher.d(teacher.a(teacher.stem(x)))))


def test_plain_layers_only_by_name() -> None:
    teacher = seeded(lambda: nn.Sequential(nn.Linear(6, 4), *(nn.Linear(4, 4) for _ in range(4))))
    with pytest.raises(ModelError, match="has no repeated blocks"):
        every_kth(teacher, layers=2)
    student = every_kth(teacher, layers=[0, 2], path="")
    x = normal(3, 6)
    assert torch.equal(student.module(x), teacher[2](teacher[0](x)))


def test_what_reduces_the_size_stays() -> None:
    """By its parameters alone each could go, but then the image would be larger."""
    halves = (nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1), nn.ReLU()) for stride in (1, 2, 1, 1, 2))
    student = every_kth(nn.Sequential(*halves), layers=3)
    assert student.layers == {"": (0, 1, 4)}
    assert student.module(normal(1, 4, 8, 8)).shape == (1, 4, 2, 2)


def test_parallel_branches_show_when_they_are_tried() -> None:
    with pytest.raises(ModelError, match=r"must answer in shapes \[\[\(2, 36\)\]\], got \[\[\(2, 18\)\]\]; of \['bran"):
        every_kth(seeded(Parallel), layers=3, example_inputs=normal(2, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers: expected 1 to 6"),
        ({"layers": 7}, "layers: expected 1 to 6"),
        ({"layers": True}, "layers: expected a number"),
        ({"layers": "12"}, "layers: expected a number"),
        ({"layers": [2, 1]}, "layers: expected ascending positions"),
        ({"layers": []}, "layers: expected ascending positions"),
        ({"layers": [5, 6]}, "layers: expected ascending positions"),
        ({"layers": 2, "keep": "middle"}, "keep: expected one of"),
        ({"layers": 2, "path": "num"}, "path: expected an nn.ModuleList"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        every_kth(seeded(Counted), **settings)  # type: ignore[arg-type]


def test_positions_need_a_path_if_lists_differ() -> None:
    with pytest.raises(ConfigError, match=r"positions need a path, for there are several lists: 'one' 0 … 5, 'two'"):
        every_kth(seeded(Stages), layers=[0, 1])
