"""Filters near the geometric median of their layer can be replaced by the others. He et al. 2019.

``Σ_j ‖F_i − F_j‖₂`` over the filters of one layer; speaks for the outputs of weights only.
https://arxiv.org/abs/1811.00250
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def slices(weight: Tensor, dim: int, evidence: Evidence) -> Tensor | None:
    """Sum of the distances to all other filters, `[O]`."""
    if weight.ndim < 2 or dim != evidence.output_dim:
        return None
    filters = weight.detach().movedim(dim, 0).flatten(1).double()  # by matrix products, which cancel in float32
    distances = torch.cdist(filters, filters, compute_mode="use_mm_for_euclid_dist").sum(1)
    return distances.to(torch.promote_types(weight.dtype, torch.float32))


fpgm = Criterion(name="fpgm", slices=slices)
