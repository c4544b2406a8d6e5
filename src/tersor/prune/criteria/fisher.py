"""Second-order change of the loss with the empirical Fisher information for the Hessian. Theis et al. 2018.

``w² · E[g²] / 2``, the diagonal of the Fisher information; batches of one example measure it as published.
https://arxiv.org/abs/1801.05787
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``w² · E[g²] / 2``."""
    return weight.detach().square() * required(evidence, "squared_gradient", weight, "fisher") / 2


fisher = Criterion(name="fisher", entries=entries, needs=frozenset({"squared_gradient"}))
