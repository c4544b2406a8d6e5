"""Squared error on raw outputs, for regression and embeddings. Ba & Caruana 2014, https://arxiv.org/abs/1312.6184.

Shapes: `B` batch, `T` tokens, `C` outputs.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import loss, squared_error


@loss
def mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``mean (s − t)²`` over all outputs, of any shape; with a mask `[B, T]`, of the tokens where it is not zero.

    Raises:
        ConfigError: if the shapes differ.
        DataError: if the mask does not fit.
    """
    return squared_error("mse", student, teacher, mask)
