"""Weights that training moves towards zero matter least. Sanh et al. 2020, https://arxiv.org/abs/2005.07683.

``−Σ_t lr · w_t · g_t``: negative where the weight shrinks.
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """The movement as measured."""
    return required(evidence, "movement", weight, "movement")


movement = Criterion(name="movement", entries=entries, needs=frozenset({"movement"}))
