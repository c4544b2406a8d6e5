"""Brings a student's and a teacher's features to one shape, so that they can be compared element by element.

FitNets (Romero et al. 2014, https://arxiv.org/abs/1412.6550) trains a regressor on the student's features for it.

Shapes: `B` batch, `C` channels, `H` `W` `L` positions, `T` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ConfigError

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_POOLS: dict[int, Any] = {
    3: functional.adaptive_avg_pool1d,
    4: functional.adaptive_avg_pool2d,
    5: functional.adaptive_avg_pool3d,
}


class Projector(nn.Module):
    """Makes a pair of features comparable: the student's get the teacher's width, the larger map is pooled.

    The map between widths is linear, `[B, T, D]` and `[B, D]` by a linear layer, `[B, C, H, W]` and `[B, C, L]` by a
    convolution of one position; the identity where widths agree. Positions are averaged on the side that has more of
    them, axis by axis, whatever sizes come. Trained with the student and thrown away with it; the caller seeds and
    places it.

    Args:
        student_width: Channels of the student.
        teacher_width: Channels of the teacher.
        rank: Number of dimensions, with the batch.
        channels_first: Whether dimension 1 holds the channels; otherwise the last does.
    """

    def __init__(self, student_width: int, teacher_width: int, *, rank: int, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.map: nn.Module = nn.Identity()
        if student_width != teacher_width and channels_first:
            self.map = _CONVOLUTIONS[rank](student_width, teacher_width, 1)
        elif student_width != teacher_width:
            self.map = nn.Linear(student_width, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in the teacher's width and the smaller of the two sizes.

        Raises:
            ConfigError: if they have different numbers of tokens.
        """
        if self.channels_first:
            size = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
            student, teacher = _pooled(student, size), _pooled(teacher, size)
        else:
            _same_tokens(student.shape, teacher.shape)
        return self.map(student), teacher


def projector(
    student_shape: Sequence[int], teacher_shape: Sequence[int], *, channels_first: bool | None = None
) -> Projector:
    """The module that makes features of these shapes comparable, `(student, teacher) -> (student, teacher)`.

    Args:
        student_shape: With the batch, whose size does not matter: `[B, C, H, W]`, `[B, C, L]`, `[B, T, D]`, `[B, D]`.
        teacher_shape: Of the same kind.
        channels_first: Which of `[B, C, L]` and `[B, T, D]` three dimensions are. By default the side that differs is
            the channels; if both do, it must be told.

    Raises:
        ConfigError: if the shapes are of different kinds, of no known kind, or have different numbers of tokens.
    """
    student, teacher = tuple(student_shape), tuple(teacher_shape)
    rank = len(student)
    if rank != len(teacher) or not 2 <= rank <= 5:
        raise ConfigError(
            f"expected two shapes of one kind, [B, D], [B, T, D], [B, C, L], [B, C, H, W] or [B, C, D, H, W], got "
            f"{_shape(student)} of the student and {_shape(teacher)} of the teacher; pair other layers, or use a loss "
            "that compares relations"
        )
    if channels_first is None:
        channels_first = rank > 3 or (rank == 3 and _is_map(student, teacher))
    if (rank == 2 and channels_first) or (rank > 3 and not channels_first):
        raise ConfigError(f"channels_first={channels_first} does not fit {_shape(student)}; leave it out")
    if not channels_first:
        _same_tokens(student, teacher)
    axis = 1 if channels_first else -1
    return Projector(student[axis], teacher[axis], rank=rank, channels_first=channels_first)


def _is_map(student: tuple[int, ...], teacher: tuple[int, ...]) -> bool:
    if student[1] != teacher[1] and student[2] != teacher[2]:
        raise ConfigError(
            f"{_shape(student)} and {_shape(teacher)} agree in no dimension: as [B, C, L] they can be compared, say "
            "channels_first=True; as [B, T, D] they cannot, because the tokens do not correspond: pair other layers"
        )
    return student[1] != teacher[1]


def _pooled(features: Tensor, size: tuple[int, ...]) -> Tensor:
    pooled: Tensor = features if features.shape[2:] == size else _POOLS[features.ndim](features, size)
    return pooled


def _same_tokens(student: Sequence[int], teacher: Sequence[int]) -> None:
    if tuple(student[1:-1]) != tuple(teacher[1:-1]):
        raise ConfigError(
            f"expected as many tokens from the student as from the teacher, got {_shape(student)} and "
            f"{_shape(teacher)}; give both the same tokens, or use a loss that compares relations of examples"
        )


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(['B', *map(str, shape[1:])])}]"
