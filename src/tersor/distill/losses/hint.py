"""Hints: the student's features become the teacher's. Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550.

Shapes: `B` batch, `C` channels, `H`, `W`, `L` sizes in space, `T` tokens, `D` width.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import loss, squared_error


@loss
def hint(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``mean (s − t)²`` over all entries of features of one shape, such as `[B, C, H, W]`, `[B, T, D]` or `[B, D]`.

    The paper sums half the squares; the mean does not depend on the layer's size. With a mask `[B, T]`, of the tokens
    where it is not zero.

    Raises:
        ConfigError: if the shapes differ.
        DataError: if the mask does not fit.
    """
    return squared_error("hint", student, teacher, mask)
