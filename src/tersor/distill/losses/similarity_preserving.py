"""Which examples of a batch are alike. Tung & Mori 2019, https://arxiv.org/abs/1907.09682.

Shapes: `B` batch, `T` tokens, `D` width.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import expect_same_examples, loss, mean, unit, without_padding


@loss
def similarity_preserving(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``1 / B² · ‖G_s − G_t‖_F²``, `G` the rows of ``X Xᵀ`` scaled to length one, `X` the features as `[B, …]`.

    Any widths and sizes. With a mask `[B, T]`, padded tokens of `[B, T, D]` count as zeros. An example of zeros is
    alike to none and has no gradient.

    Raises:
        ConfigError: if the features do not hold the same examples.
        DataError: if the mask does not fit.
    """
    expect_same_examples("similarity_preserving", student, teacher)
    return mean((_similarities(student, mask) - _similarities(teacher, mask)).square())


def _similarities(features: Tensor, mask: Tensor | None) -> Tensor:
    flat = without_padding("similarity_preserving", features, mask).flatten(1)
    flat = flat / flat.detach().abs().amax().clamp_min(1e-12)  # of no effect on the rows, but no square overflows
    return unit(flat @ flat.T)
