"""Small weights matter least; of units, those of the smallest Euclidean norm. Survey: Blalock et al. 2020.

``w²``; single weights rank as with `l1`. https://arxiv.org/abs/2003.03033
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``w²``."""
    return weight.detach().square()


l2 = Criterion(name="l2", entries=entries)
