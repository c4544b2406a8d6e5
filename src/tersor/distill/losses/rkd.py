"""Relational knowledge distillation: distances and angles between examples. Park et al. 2019.

https://arxiv.org/abs/1904.05068. Shapes: `B` batch, `T` tokens, `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tersor.distill.losses.base import Weight, expect_same_examples, loss, mean, without_padding

COINCIDE = 1e-12  # squared distance over the largest squared norm: below it, float32 features are one point


@loss
def rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: Weight = 1.0,
    angle: Weight = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``distance · mean_ij h(d_ij / μ) + angle · mean_ijk h(cos ∠ijk)``, `h` Huber's loss of student against teacher.

    `d` are the distances between the features `[B, …]` of two examples and `μ` their mean, in each model its own; the
    angle at `j` is between the directions to `i` and `k`. Pairs and triples are of different examples; a batch of one
    has no pairs, one of two no triples, and both terms are then 0. Where two examples coincide there is no direction:
    the distance is 0, the cosine too, without a gradient. Time and memory grow like `B³`.

    Any widths. 1 and 2 are the paper's weights where this is the only loss (metric learning); beside a cross entropy of
    weight 1, it takes 25 and 50. With a mask `[B, T]`, padded tokens of `[B, T, D]` count as zeros.

    Raises:
        ConfigError: if the features do not hold the same examples, or a weight is below 0.
        DataError: if the mask does not fit.
    """
    expect_same_examples("rkd", student, teacher)
    student_distances, student_cosines = _relations(without_padding("rkd", student, mask))
    teacher_distances, teacher_cosines = _relations(without_padding("rkd", teacher, mask))
    pairs = mean(functional.smooth_l1_loss(student_distances, teacher_distances, reduction="none"))
    triples = mean(functional.smooth_l1_loss(student_cosines, teacher_cosines, reduction="none"))
    return (distance * pairs + angle * triples).to(student.dtype)


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean, `[B (B − 1)]`, and cosines, `[B (B − 1) (B − 2)]`, from inner products alone.

    In float64, since differences of inner products cancel; differences of features would take `B² · D` of memory.
    """
    flat = features.flatten(1).double()
    flat = flat - flat.mean(0)
    gram = flat @ flat.T
    norms = gram.diagonal()
    squares = norms[:, None] + norms - 2 * gram
    different = ~torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    apart = different & (squares > COINCIDE * norms.detach().amax())
    lengths = torch.where(apart, squares, 1).sqrt()
    distances = torch.where(apart, lengths, 0)
    scale = mean(distances[different])
    distances = distances[different] / torch.where(scale > 0, scale, 1)
    # ⟨x_i − x_j, x_k − x_j⟩ at [i, j, k]
    products = gram[:, None, :] - gram[:, :, None] - gram[None] + norms[None, :, None]
    valid = apart[:, :, None] & apart[None]
    cosines = torch.where(valid, products / (lengths[:, :, None] * lengths[None]), 0)
    return distances, cosines[different[:, :, None] & different[None] & different[:, None]]
