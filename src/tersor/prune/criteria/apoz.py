"""Average percentage of zeros: outputs that are mostly silent matter least. Hu et al. 2016.

``1 − share of activations that are zero or less``; speaks for the outputs of weights only. Measured behind the
normalisation that follows the layer, where a ReLU would cut; for other activations it is a stand-in.
https://arxiv.org/abs/1607.03250
"""

from __future__ import annotations

from torch import Tensor

from tersor.prune.criteria.base import Criterion, Evidence, required


def slices(weight: Tensor, dim: int, evidence: Evidence) -> Tensor | None:
    """Share of examples and positions at which each output is positive, `[O]`."""
    if evidence.zero_share is None or dim != evidence.output_dim:
        return None
    return 1 - required(evidence, "zero_share", weight, "apoz")


apoz = Criterion(name="apoz", slices=slices, needs=frozenset({"zero_share"}))
