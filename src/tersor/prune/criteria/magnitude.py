"""Magnitude: small weights matter least. Han et al. 2015, https://arxiv.org/abs/1506.02626."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """``|w|``, entry by entry."""
    return weight.detach().abs()
