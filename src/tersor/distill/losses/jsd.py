"""Generalised Jensen-Shannon divergence. Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649.

Shapes: `B` batch, `T` tokens, `C` classes or the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.distill.losses.base import Positive, Share, divergence, logit_rows, loss, mean, soften


@loss
def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: Share = 0.5,
    temperature: Positive = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``T² · (β · KL(p_t ‖ m) + (1 − β) · KL(p_s ‖ m))``, ``m = β p_t + (1 − β) p_s``, mean over rows of `[B, …, C]`.

    It lies between `kd` (the value over `β`, as `β` goes to 0) and `reverse_kl` (over ``1 − β``, as `β` goes to 1), and
    at ``T = 1`` never exceeds the entropy of ``(β, 1 − β)``: single tokens cannot take over the gradient.

    Raises:
        ConfigError: if the shapes differ or a setting is out of range.
        DataError: if the mask `[B, T]` does not fit.
    """
    student, teacher = logit_rows("jsd", student, teacher, mask)
    student, teacher = soften(student, temperature), soften(teacher, temperature)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    value = beta * mean(divergence(teacher, mixture)) + (1 - beta) * mean(divergence(student, mixture))
    return temperature**2 * value
