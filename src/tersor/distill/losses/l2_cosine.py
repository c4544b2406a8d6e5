"""Distance of normalised features and angle of their vectors. Kim et al. 2018, Sanh et al. 2019.

Normalising whole examples as in https://arxiv.org/abs/1802.04977, cosines as in https://arxiv.org/abs/1910.01108.
Shapes: `B` batch, `C` channels, `H`, `W`, `L` sizes in space, `T` tokens, `D` width.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import (
    Axis,
    Weight,
    channels_last,
    counted,
    expect_same_shape,
    loss,
    mean,
    unit,
    without_padding,
)


@loss
def l2_cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    l2: Weight = 1.0,
    cosine: Weight = 1.0,
    channel_axis: Axis = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``l2 · mean_B ‖S / ‖S‖₂ − T / ‖T‖₂‖₂² + cosine · mean (1 − cos(s, t))``, features of one shape.

    `S` and `T` are whole examples: how strong a place is beside the others counts, the overall scale does not. `s` and
    `t` are the vectors of single places or tokens, of which only the direction counts. For `[B, D]` both terms say the
    same, ``(2 · l2 + cosine) · (1 − cos)``. A vector of zeros has no direction: its cosine is 0, its gradient too;
    where both are zero nothing is added.

    Args:
        student: `[B, C, H, W]`, `[B, T, D]`, `[B, C, L]` or `[B, D]`.
        teacher: The same shape.
        l2: Weight of the first term.
        cosine: Weight of the second.
        channel_axis: Where the vectors lie; by default dimension 1 of four, else the last. 1 for `[B, C, L]`.
        mask: `[B, T]` for `[B, T, D]`; tokens where it is zero do not count.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.
        DataError: if the mask does not fit.
    """
    expect_same_shape("l2_cosine", student, teacher)
    student, teacher = without_padding("l2_cosine", student, mask), without_padding("l2_cosine", teacher, mask)
    whole = (unit(student.flatten(1)) - unit(teacher.flatten(1))).square().sum(1)
    one, other = (unit(channels_last("l2_cosine", features, channel_axis)) for features in (student, teacher))
    directed = (one != 0).any(-1) | (other != 0).any(-1)
    apart = directed.to(one.dtype) - (one * other).sum(-1)
    if mask is not None:
        apart = apart[counted("l2_cosine", mask, apart.shape)]
    return l2 * mean(whole) + cosine * mean(apart)
