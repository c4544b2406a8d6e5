"""Relations between tokens, with relation heads. Wang et al. 2021 (MiniLM-v2), https://arxiv.org/abs/2012.15828.

Shapes: `B` batch, `T` tokens, `D` width, `A` relation heads, `d = D / A`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tersor.distill.losses.base import Count, counted, divergence, expect_same_examples, loss, mean, without_padding
from tersor.errors import ConfigError


@loss
def minilm_relations(student: Tensor, teacher: Tensor, *, heads: Count, mask: Tensor | None = None) -> Tensor:
    """``mean KL(R_t ‖ R_s)`` of ``R = softmax(X_a X_aᵀ / √d)``, over relation heads `a`, examples and query tokens.

    `X` `[B, T, D]` are the queries, the keys or the values of one attention layer, one loss for each; `X_a` is a slice
    of width `d`. The widths of student and teacher may differ, also the numbers of their attention heads: the relation
    heads are cut anew. The paper takes the last layer of a base and an upper one of a large teacher, and more relation
    heads than attention heads (48 for 12).

    Args:
        student: `[B, T, D]`.
        teacher: `[B, T, D']`.
        heads: Relation heads; must divide both widths.
        mask: `[B, T]`; tokens where it is zero are no keys and no queries.

    Raises:
        ConfigError: if the tokens differ, or `heads` does not divide a width.
        DataError: if the mask does not fit.
    """
    expect_same_examples("minilm_relations", student, teacher, least=3)
    if student.shape[:-1] != teacher.shape[:-1] or student.dim() != 3:
        raise ConfigError(
            f"minilm_relations needs features [B, T, D] of the same tokens, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    for whose, width in (("student", student.shape[-1]), ("teacher", teacher.shape[-1])):
        if width % heads:
            raise ConfigError(
                f"minilm_relations.heads: expected a divisor of both widths, but {heads} does not divide the {whose}'s "
                f"{width}; {math.gcd(student.shape[-1], teacher.shape[-1])} and its divisors fit"
            )
    keep = None if mask is None else counted("minilm_relations", mask, student.shape[:-1])
    rows = divergence(_relations(teacher, heads, keep), _relations(student, heads, keep)).transpose(1, 2)
    return mean(rows if keep is None else rows[keep])


def _relations(features: Tensor, heads: int, keep: Tensor | None) -> Tensor:
    """Logarithms of the relations, `[B, A, T, T]`; padded keys have next to none."""
    batch, tokens, width = features.shape
    cut = (
        without_padding("minilm_relations", features, keep)
        .reshape(batch, tokens, heads, width // heads)
        .transpose(1, 2)
    )
    scores: Tensor = cut @ cut.transpose(-1, -2) / math.sqrt(cut.shape[-1])
    if keep is not None:
        # Not minus infinity, whose difference to itself is no number.
        scores = scores.masked_fill(~keep[:, None, None], torch.finfo(scores.dtype).min / 4)
    return functional.log_softmax(scores, dim=-1)
