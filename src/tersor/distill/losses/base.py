"""What every distillation loss promises, and the arithmetic that several of them share.

Shapes: `B` batch, `T` tokens, `C` channels or classes, `D` width of a token, `H`, `W`, `L` sizes in space, `N` rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import ConfigError, DataError

P = ParamSpec("P")
Loss = Callable[Concatenate[Tensor, Tensor, P], Tensor]
SMALLEST_NORM = 1e-12  # what is shorter has no direction
CONSTANT = 1e-6  # spread over magnitude below which values are equal up to float32 rounding


@dataclass(frozen=True)
class Allowed:
    """Values that a setting may take, for people and as a test."""

    what: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Positive = Annotated[float, Allowed("a number above 0", lambda value: _number(value) and value > 0)]
Weight = Annotated[float, Allowed("a number of at least 0", lambda value: _number(value) and value >= 0)]
Share = Annotated[float, Allowed("a number between 0 and 1, both excluded", lambda v: _number(v) and 0 < v < 1)]
Count = Annotated[
    int, Allowed("a whole number of at least 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1)
]
Axis = Annotated[int | None, Allowed("1 or -1, or nothing", lambda v: v is None or (type(v) is int and v in (1, -1)))]


def ranges_of(function: Callable[..., Any]) -> dict[str, Allowed]:
    """What each setting of a loss may be, as its annotation says."""
    called = vars(function)["__init__"] if isinstance(function, type) else function
    hints = get_type_hints(called, include_extras=True)
    found = {name: [part for part in get_args(hint) if isinstance(part, Allowed)] for name, hint in hints.items()}
    return {name: parts[0] for name, parts in found.items() if parts}


def expect_in_range(name: str, settings: Mapping[str, Any], ranges: Mapping[str, Allowed]) -> None:
    """Raises `ConfigError` for the first setting outside its range."""
    for setting, value in settings.items():
        if setting in ranges and not ranges[setting].holds(value):
            raise ConfigError(f"{name}.{setting}: expected {ranges[setting].what}, got {value!r}")


def loss(function: Loss[P]) -> Loss[P]:
    """Makes a formula a loss: settings checked, at least float32 also under autocast, no gradient to the teacher."""
    ranges = ranges_of(function)

    @functools.wraps(function)
    def promised(student: Tensor, teacher: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        expect_in_range(function.__name__, kwargs, ranges)
        with torch.autocast(student.device.type, enabled=False):
            return function(*precise(student, teacher), *args, **kwargs)

    return promised


def precise(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's type, at least float32; the teacher cut off from its graph."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def expect_same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raises `ConfigError` if a comparison element by element is impossible."""
    if student.shape != teacher.shape:
        raise ConfigError(
            f"{name} needs the same shape from student and teacher, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; between features of different shapes use a projector or a relational loss"
        )


def expect_same_examples(name: str, student: Tensor, teacher: Tensor, *, least: int = 2) -> None:
    """Raises `ConfigError` if the tensors do not hold the same examples in at least `least` dimensions."""
    if min(student.dim(), teacher.dim()) < least or len(student) != len(teacher):
        raise ConfigError(
            f"{name} needs features [B, …] of at least {least} dimensions and the same examples, got "
            f"{tuple(student.shape)} from the student and {tuple(teacher.shape)} from the teacher"
        )


def counted(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask as booleans; raises `DataError` if it is not of this shape."""
    if mask.shape != shape:
        raise DataError(
            f"{name}: expected a mask of shape {tuple(shape)}, one entry for each token, got {tuple(mask.shape)}"
        )
    return mask != 0


def logit_rows(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[B, …, C]` as `[N, C]`, both: every row, or those that the mask counts."""
    expect_same_shape(name, student, teacher)
    if student.dim() < 2:
        raise ConfigError(f"{name} needs logits [B, …, C], got {tuple(student.shape)}")
    if mask is None:
        return student.flatten(0, -2), teacher.flatten(0, -2)
    keep = counted(name, mask, student.shape[:-1])
    return student[keep], teacher[keep]


def mean(values: Tensor) -> Tensor:
    """The mean; of nothing, zero."""
    return values.sum() / max(values.numel(), 1)


def divergence(of: Tensor, around: Tensor) -> Tensor:
    """``Σ_c p (log p − log q)``, `[N]`, from logarithms of probabilities `[N, C]`."""
    return (of.exp() * (of - around)).sum(-1)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Logarithms of softened probabilities."""
    return functional.log_softmax(logits / temperature, dim=-1)


def squared_error(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """``mean (s − t)²`` over all entries, or those of the tokens that the mask counts."""
    expect_same_shape(name, student, teacher)
    if mask is not None:
        keep = counted(name, mask, student.shape[:-1])
        student, teacher = student[keep], teacher[keep]
    return mean((student - teacher).square())


def unit(vectors: Tensor, floor: Tensor | float = SMALLEST_NORM) -> Tensor:
    """``v / ‖v‖₂`` along the last dimension; a vector whose largest entry is below `floor` becomes zero.

    Its gradient then is zero too, where that of the plain quotient has no bound. Squares never overflow.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    alive = largest > floor
    scaled = torch.where(alive, vectors, 0) / torch.where(alive, largest, 1)
    squared = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(alive, squared, 1).rsqrt()


def standardised(vectors: Tensor) -> Tensor:
    """Centred and of length one along the last dimension; constant vectors become zero."""
    magnitude = vectors.detach().abs().amax(-1, keepdim=True)
    return unit(vectors - vectors.mean(-1, keepdim=True), (CONSTANT * magnitude).clamp_min(SMALLEST_NORM))


def without_padding(name: str, features: Tensor, mask: Tensor | None) -> Tensor:
    """Features whose padded tokens are zero."""
    if mask is None:
        return features
    if features.dim() != 3:
        raise DataError(f"{name}: only features [B, T, D] have a mask, got features {tuple(features.shape)}")
    return torch.where(counted(name, mask, features.shape[:-1])[..., None], features, 0)


def channels_last(name: str, features: Tensor, axis: int | None) -> Tensor:
    """`[B, …, C]`; without `axis`, channels are dimension 1 of four and the last of two or three."""
    if axis is None:
        axis = 1 if features.dim() == 4 else -1
    if features.dim() not in (2, 3, 4):
        raise ConfigError(f"{name} needs features of two to four dimensions, got {tuple(features.shape)}")
    return features.movedim(axis, -1)
