"""Network slimming: a channel that its normalisation scales down matters least. Liu et al. 2017.

``|γ|``; speaks for the scales of normalisation layers only. https://arxiv.org/abs/1708.06519
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def slices(weight: Tensor, dim: int, evidence: Evidence) -> Tensor | None:
    """``|γ|`` where the parameter's role is `scale`."""
    return weight.detach().abs() if evidence.role == "scale" and weight.ndim == 1 else None


batchnorm_scale = Criterion(name="batchnorm_scale", slices=slices)
