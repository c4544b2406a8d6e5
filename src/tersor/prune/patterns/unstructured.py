"""Entry by entry: the finest pattern, and the one that no hardware skips. LeCun et al. 1989.

See also Han et al. 2015, https://arxiv.org/abs/1506.02626.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.prune.patterns.base import lowest


def unstructured(scores: Tensor, amount: float) -> Tensor:
    """Keep-mask `[O, K]` that loses the share `amount` of the entries, the lowest scores first."""
    return lowest(scores, amount)


def per_output(scores: Tensor, amount: float) -> Tensor:
    """Keep-mask `[O, K]` under which every output loses the same share of its inputs, ``round(amount · K)`` of them.

    Sun et al. 2023 (Wanda), https://arxiv.org/abs/2306.11695.
    """
    gone = scores.argsort(dim=1, stable=True)[:, : round(amount * scores.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, gone, False)
