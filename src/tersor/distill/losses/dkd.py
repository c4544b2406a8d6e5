"""Decoupled knowledge distillation: the target class and the others, weighed apart. Zhao et al. 2022.

https://arxiv.org/abs/2203.08679. Shapes: `B` batch, `T` tokens, `C` classes, `N` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.distill.losses.base import Positive, Weight, counted, divergence, logit_rows, loss, mean, soften
from tersor.errors import ConfigError, DataError


@loss
def dkd(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
    temperature: Positive = 4.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``T² · (α · KL(b_t ‖ b_s) + β · KL(p̂_t ‖ p̂_s))``, mean over all rows of the logits `[B, …, C]`.

    ``b = (p_y, 1 − p_y)`` says how sure a model is of the true class `y`, ``p̂`` is the softmax over the other classes
    alone. In `kd` the second term is weighed by ``1 − p_y`` of the teacher, so what a sure teacher knows about the
    others is nearly lost; here its weight is free. The paper raises the weight over the first epochs, and the best
    `beta` differs between pairs of models.

    Args:
        student: Logits.
        teacher: Logits.
        labels: The true classes `[B, …]`, integers.
        alpha: Weight of the true class.
        beta: Weight of the other classes.
        temperature: Softens both.
        mask: `[B, T]`, rows that count; labels elsewhere are not read.

    Raises:
        ConfigError: if the shapes differ, there is one class only, or a setting is out of range.
        DataError: if labels or mask do not fit.
    """
    classes = student.shape[-1]
    if labels.shape != student.shape[:-1] or labels.is_floating_point():
        raise DataError(
            f"dkd: expected integer labels of shape {tuple(student.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    true = labels.flatten() if mask is None else labels[counted("dkd", mask, student.shape[:-1])]
    student, teacher = logit_rows("dkd", student, teacher, mask)
    if classes < 2:
        raise ConfigError("dkd needs at least two classes, got 1")
    if true.numel() and (int(true.min()) < 0 or int(true.max()) >= classes):
        raise DataError(f"dkd: expected labels 0..{classes - 1}, got {int(true.min())}..{int(true.max())}")
    sure_student, rest_student = _decoupled(student / temperature, true)
    sure_teacher, rest_teacher = _decoupled(teacher / temperature, true)
    target = mean(divergence(sure_teacher, sure_student))
    others = mean(divergence(rest_teacher, rest_student))
    return temperature**2 * (alpha * target + beta * others)


def _decoupled(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of `(p_y, 1 − p_y)`, `[N, 2]`, and of the probabilities among the other classes, `[N, C − 1]`."""
    is_true = torch.arange(logits.shape[1], device=logits.device) == true[:, None]
    rest = logits[~is_true].reshape(len(logits), logits.shape[1] - 1)
    pair = torch.stack([logits[is_true], rest.logsumexp(1)], dim=1)
    return soften(pair, 1.0), soften(rest, 1.0)
