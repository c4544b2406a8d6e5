"""First-order Taylor: what the loss would change if it were linear. Molchanov et al. 2019.

``|w · g|`` of a weight; ``(Σ w · g)²`` of a unit, since what its weights do may cancel.
https://arxiv.org/abs/1906.10771
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, required


def entries(weight: Tensor, evidence: Evidence) -> Tensor:
    """``|w · g|``."""
    return terms(weight, evidence).abs()


def terms(weight: Tensor, evidence: Evidence) -> Tensor:
    """``w · g``."""
    return weight.detach() * required(evidence, "gradient", weight, "taylor")


taylor = Criterion(name="taylor", entries=entries, terms=terms, needs=frozenset({"gradient"}))
