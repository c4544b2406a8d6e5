"""Contrastive representation distillation. Tian et al. 2020, https://arxiv.org/abs/1910.10699.

Shapes: `B` batch, `C` channels, `H`, `W`, `L` sizes in space, `T` tokens, `D` width, `E` width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.distill.losses.base import (
    Axis,
    Count,
    Positive,
    channels_last,
    counted,
    expect_in_range,
    expect_same_examples,
    precise,
    ranges_of,
    unit,
)
from tersor.errors import ConfigError


class Crd(nn.Module):
    """``½ (CE(S Tᵀ / τ, i) + CE(T Sᵀ / τ, i))``: which student feature belongs to which teacher feature?

    `S` and `T` are linear embeddings `[B, E]` of both features, of length one, learned with the student; places and
    tokens are averaged before. The paper contrasts each example with 16,384 others from a memory of past embeddings,
    with a noise-contrastive loss. Here the others are those of the batch, in the InfoNCE form: no state that grows with
    the data, needs the numbers of the examples, or has to be resumed; with few negatives the task is easier, so large
    batches help. Others may be of the same class. A batch of one has nothing to contrast: the loss is 0.

    Args:
        student_width: Channels of the student's feature.
        teacher_width: Channels of the teacher's.
        width: `E`.
        temperature: `τ`.
        channel_axis: Where the channels lie; by default dimension 1 of four, else the last. 1 for `[B, C, L]`.

    Raises:
        ConfigError: if a width or setting is out of range.
    """

    def __init__(
        self,
        student_width: Count,
        teacher_width: Count,
        *,
        width: Count = 128,
        temperature: Positive = 0.07,
        channel_axis: Axis = None,
    ) -> None:
        super().__init__()
        widths = {"student_width": student_width, "teacher_width": teacher_width, "width": width}
        others = {"temperature": temperature, "channel_axis": channel_axis}
        expect_in_range("crd", widths | others, ranges_of(Crd))
        self.temperature, self.channel_axis = temperature, channel_axis
        self.student, self.teacher = nn.Linear(student_width, width), nn.Linear(teacher_width, width)

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of features such as `[B, C, H, W]`, `[B, T, D]` with a mask `[B, T]`, or `[B, D]`.

        Raises:
            ConfigError: if the features do not hold the same examples, or not of these widths.
            DataError: if the mask does not fit.
        """
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = precise(student, teacher)
            expect_same_examples("crd", student, teacher)
            one = unit(self.student(self._pooled(student, mask, self.student, "student")))
            other = unit(self.teacher(self._pooled(teacher, mask, self.teacher, "teacher")))
            scores = one @ other.T / self.temperature
            same = torch.arange(len(scores), device=scores.device)
            return (functional.cross_entropy(scores, same) + functional.cross_entropy(scores.T, same)) / 2

    def _pooled(self, features: Tensor, mask: Tensor | None, embedding: nn.Linear, whose: str) -> Tensor:
        """`[B, C]`: the mean over places, or over the tokens that count."""
        features = channels_last("crd", features, self.channel_axis)
        if features.shape[-1] != embedding.in_features:
            raise ConfigError(
                f"crd was made for a {whose} of {embedding.in_features} channels, got {features.shape[-1]}; features "
                "[B, C, L] need channel_axis=1"
            )
        if mask is None:
            return features.flatten(1, -2).mean(1) if features.dim() > 2 else features
        keep = counted("crd", mask, features.shape[:-1])[..., None]
        return torch.where(keep, features, 0).sum(1) / keep.sum(1).clamp_min(1)
