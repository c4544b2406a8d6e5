"""Distillation on standardised logits. Sun et al. 2024, https://arxiv.org/abs/2403.01427.

Shapes: `B` batch, `T` tokens, `C` classes.
"""

from __future__ import annotations

import math

from torch import Tensor

from tersor.distill.losses.base import Positive, divergence, logit_rows, loss, mean, soften, standardised


@loss
def logit_standardisation(
    student: Tensor, teacher: Tensor, *, temperature: Positive = 2.0, mask: Tensor | None = None
) -> Tensor:
    """``T² · KL(softmax(z(t) / T) ‖ softmax(z(s) / T))`` with ``z(x) = (x − mean x) / std x`` over the classes.

    The student only has to order and space its logits as the teacher does; their magnitude and offset are free. `T` is
    the paper's base temperature. Logits `[B, …, C]` that are all equal become zeros and have no gradient.

    The paper weighs this term by 9 beside 0.1 of the cross entropy.

    Raises:
        ConfigError: if the shapes differ or the temperature is not above 0.
        DataError: if the mask does not fit.
    """
    student, teacher = logit_rows("logit_standardisation", student, teacher, mask)
    scale = math.sqrt(student.shape[-1])  # vectors of length one have standard deviation 1 / √C
    student, teacher = scale * standardised(student), scale * standardised(teacher)
    return temperature**2 * mean(divergence(soften(teacher, temperature), soften(student, temperature)))
