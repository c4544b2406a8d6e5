"""Attention transfer: where the activations are strong. Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928.

Shapes: `B` batch, `C` channels, `H`, `W`, `L` sizes in space.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tersor.distill.losses.base import expect_same_examples, loss, mean, unit
from tersor.errors import ConfigError


@loss
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_B ‖Q(s) / ‖Q(s)‖₂ − Q(t) / ‖Q(t)‖₂‖₂²`` of the maps ``Q(x) = mean_C x²``.

    Features `[B, C, H, W]` or `[B, C, L]` of any widths; along each side the larger map is averaged down to the smaller
    one. The paper writes the norm without the square; squared it is smooth where both agree. A map of zeros stays
    zero and has no gradient.

    Raises:
        ConfigError: if the features do not hold the same examples in the same number of dimensions.
    """
    expect_same_examples("attention_transfer", student, teacher, least=3)
    if student.dim() != teacher.dim() or student.dim() > 4:
        raise ConfigError(
            f"attention_transfer needs [B, C, H, W] or [B, C, L] from both, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    sizes = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return mean((_map(student, sizes) - _map(teacher, sizes)).square().sum(1))


def _map(features: Tensor, sizes: list[int]) -> Tensor:
    """The normalised map, flat: `[B, H · W]`."""
    largest = features.detach().abs().flatten(1).amax(1).clamp_min(1e-12)  # so that no square overflows
    squares = (features / largest.reshape(-1, *[1] * (features.dim() - 1))).square().mean(1, keepdim=True)
    if list(squares.shape[2:]) != sizes:
        if len(sizes) == 1:
            squares = functional.adaptive_avg_pool1d(squares, sizes[0])
        else:
            squares = functional.adaptive_avg_pool2d(squares, (sizes[0], sizes[1]))
    return unit(squares.flatten(1))
