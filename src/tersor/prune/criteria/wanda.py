"""Weight times the size of its input. Sun et al. 2023, https://arxiv.org/abs/2306.11695.

``|w_ij| · ‖x_j‖₂ / √n``; the paper compares within each row, so rank per output where the pattern allows.
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, per_column, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``|w_ij| · √gram_jj``."""
    size = required(evidence, "gram", weight, "wanda").diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return weight.detach().abs() * per_column(size, weight, evidence.output_dim)


wanda = Criterion(name="wanda", entries=entries, needs=frozenset({"gram"}))
