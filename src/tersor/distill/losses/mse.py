"""Squared error on raw outputs, for regression and embeddings. Ba & Caruana 2014, https://arxiv.org/abs/1312.6184."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mse(student_outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """``mean (s − t)²``; the temperature plays no part."""
    return functional.mse_loss(student_outputs, teacher_outputs)
