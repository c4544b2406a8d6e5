"""Small weights matter least. Han et al. 2015, https://arxiv.org/abs/1506.02626; filters by it: Li et al. 2016.

``|w|``; see also https://arxiv.org/abs/1608.08710.
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``|w|``."""
    return weight.detach().abs()


l1 = Criterion(name="l1", entries=entries)
