"""Knowledge distillation on softened class probabilities. Hinton et al. 2015, https://arxiv.org/abs/1503.02531.

Shapes: `B` batch, `C` classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))``, mean over the batch; logits `[B, …, C]`.

    Gradients of the softened divergence shrink like ``1/T²``; the factor undoes that, so that the balance with a
    hard loss does not depend on the temperature.
    """
    student = functional.log_softmax(student_logits / temperature, dim=-1).flatten(0, -2)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=-1).flatten(0, -2)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
