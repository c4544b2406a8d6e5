"""Reverse divergence, which seeks the teacher's modes. Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543.

Shapes: `B` batch, `T` tokens, `C` classes or the vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import Positive, divergence, logit_rows, loss, mean, soften


@loss
def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: Positive = 1.0, mask: Tensor | None = None) -> Tensor:
    """``T² · KL(softmax(s / T) ‖ softmax(t / T))``, mean over all rows of the logits `[B, …, C]`.

    `kd` punishes a student that misses anything the teacher finds likely; this one punishes a student that finds likely
    what the teacher does not. A small language model then keeps to what it can do well. This is the divergence at each
    token of given texts; that the texts are the student's own samples is up to the data.

    Raises:
        ConfigError: if the shapes differ or the temperature is not above 0.
        DataError: if the mask `[B, T]` does not fit.
    """
    student, teacher = logit_rows("reverse_kl", student, teacher, mask)
    return temperature**2 * mean(divergence(soften(student, temperature), soften(teacher, temperature)))
