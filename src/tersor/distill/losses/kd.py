"""Knowledge distillation on softened class probabilities. Hinton et al. 2015, https://arxiv.org/abs/1503.02531.

Shapes: `B` batch, `T` tokens, `C` classes.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import Positive, divergence, logit_rows, loss, mean, soften


@loss
def kd(student: Tensor, teacher: Tensor, *, temperature: Positive = 4.0, mask: Tensor | None = None) -> Tensor:
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))``, mean over all rows of the logits `[B, …, C]`.

    Gradients of the softened divergence shrink like ``1/T²``; the factor undoes that, so that the balance with a
    hard loss does not depend on the temperature. With a mask `[B, T]`, logits of a language model `[B, T, C]` are
    compared where it is not zero.

    Raises:
        ConfigError: if the shapes differ or the temperature is not above 0.
        DataError: if the mask does not fit.
    """
    student, teacher = logit_rows("kd", student, teacher, mask)
    return temperature**2 * mean(divergence(soften(teacher, temperature), soften(student, temperature)))
