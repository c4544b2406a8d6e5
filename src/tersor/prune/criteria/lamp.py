"""Layer-adaptive magnitude: how much of what would be left in its layer a weight is. Lee et al. 2020.

``w_u² / Σ_v w_v²`` over all `v` of the layer with ``|w_v| ≥ |w_u|``. The largest weight of every layer scores 1, so a
global ranking empties no layer. https://arxiv.org/abs/2010.07611
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """Share of the weight's square in the squares that are not smaller."""
    squares = weight.detach().flatten().double()
    squares = (squares / squares.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).square()
    ordered, order = squares.sort(descending=True, stable=True)
    scores = torch.empty_like(ordered)
    scores[order] = ordered / ordered.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return scores.reshape(weight.shape).to(torch.promote_types(weight.dtype, torch.float32))


lamp = Criterion(name="lamp", entries=entries)
