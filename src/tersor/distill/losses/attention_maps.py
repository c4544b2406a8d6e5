"""Attention matrices of the student become the teacher's. Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351.

Shapes: `B` batch, `H` attention heads, `T` tokens.
"""

from __future__ import annotations

from torch import Tensor

from tersor.distill.losses.base import counted, expect_same_shape, loss, mean
from tersor.errors import ConfigError


@loss
def attention_maps(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``mean (A_s − A_t)²`` of attention matrices `[B, H, T, T]`, with a mask `[B, T]` where query and key count.

    Both models need as many heads; `minilm_relations` does not. The paper takes the scores before the softmax, which
    taught its students faster than probabilities; entries that attention hides must then be hidden by the mask, or be
    the same finite number in both.

    Raises:
        ConfigError: if the shapes differ or are not `[B, H, T, T]`.
        DataError: if the mask does not fit.
    """
    expect_same_shape("attention_maps", student, teacher)
    if student.dim() != 4 or student.shape[-1] != student.shape[-2]:
        raise ConfigError(f"attention_maps needs attention matrices [B, H, T, T], got {tuple(student.shape)}")
    if mask is not None:
        keep = counted("attention_maps", mask, student.shape[::3])
        both = keep[:, :, None] & keep[:, None]
        student, teacher = student.permute(0, 2, 3, 1)[both], teacher.permute(0, 2, 3, 1)[both]
    return mean((student - teacher).square())
