"""Correlations instead of probabilities: distillation from a stronger teacher. Huang et al. 2022.

https://arxiv.org/abs/2205.10536. Shapes: `B` batch, `T` tokens, `C` classes, `N` rows.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import Positive, Weight, logit_rows, loss, mean, soften, standardised


@loss
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: Weight = 1.0,
    gamma: Weight = 1.0,
    temperature: Positive = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``β · mean_i (1 − ρ(S_i·, T_i·)) + γ · mean_c (1 − ρ(S_·c, T_·c))`` of probabilities ``softmax(logits / T)``.

    `ρ` is Pearson's correlation: of an example's classes (inter-class), and of a class over the batch (intra-class).
    The student may be as much less sure of itself as it likes. Where one side is constant there is no correlation, and
    that row or column adds nothing; for a batch of one that is all of the second term. There is no ``T²``: the gradient
    of a correlation does not shrink like ``1/T²``.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.
        DataError: if the mask does not fit.
    """
    student, teacher = logit_rows("dist", student, teacher, mask)
    if not len(student):
        return mean(student)
    student, teacher = soften(student, temperature).exp(), soften(teacher, temperature).exp()
    return beta * _uncorrelated(student, teacher) + gamma * _uncorrelated(student.T, teacher.T)


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (1 − ρ)`` over the rows."""
    student, teacher = standardised(student), standardised(teacher)
    defined = (student != 0).any(1) & (teacher != 0).any(1)
    return mean(defined.to(student.dtype) - (student * teacher).sum(1))
