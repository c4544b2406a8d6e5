"""Chance: what every criterion has to beat. Mittal et al. 2018, https://arxiv.org/abs/1801.10447.

``U(0, 1)``, seeded by the weight's shape: the same shape gets the same scores, today and tomorrow.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """Uniform random numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(tuple(weight.shape)).encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


random = Criterion(name="random", entries=entries)
