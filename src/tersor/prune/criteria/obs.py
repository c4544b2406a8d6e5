"""Optimal brain surgeon on the layer's own squared error: removal after which the rest repairs. Hassibi & Stork 1992.

``w_ij² / (2 [H⁻¹]_jj)`` with ``H = 2 (gram + λ I)``: the least ``E‖W x − W' x‖²`` (up to damping) when that one weight
is zeroed and its row refitted. Layer-wise: Dong et al. 2017, https://arxiv.org/abs/1705.07565
"""

from __future__ import annotations

from torch import Tensor

from tersor.probe.hessian import damped_inverse
from tersor.prune.criteria.base import Criterion, Evidence, per_column, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``w_ij² / [(gram + λ I)⁻¹]_jj``."""
    inverse = damped_inverse(required(evidence, "gram", weight, "obs"))
    repair = inverse.diagonal(dim1=-2, dim2=-1).reciprocal()
    return weight.detach().square() * per_column(repair, weight, evidence.output_dim)


obs = Criterion(name="obs", entries=entries, needs=frozenset({"gram"}))
