"""Optimal brain damage on the layer's own squared error: removal without any repair. LeCun et al. 1989.

``w_ij² · E[x_j²]``, exactly the error ``E‖W x − W' x‖²`` after zeroing that one weight: OBD's ``w² h / 2`` with
``h = 2 E[x_j²]``, the Hessian's diagonal. No arXiv; layer-wise: Dong et al. 2017, https://arxiv.org/abs/1705.07565
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, per_column, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``w_ij² · gram_jj``."""
    energy = required(evidence, "gram", weight, "obd").diagonal(dim1=-2, dim2=-1)
    return weight.detach().square() * per_column(energy, weight, evidence.output_dim)


obd = Criterion(name="obd", entries=entries, needs=frozenset({"gram"}))
