"""N:M fine-grained sparsity: of every `M` consecutive inputs of an output, `N` stay. Mishra et al. 2021.

2:4 is what NVIDIA's sparse tensor cores multiply, https://arxiv.org/abs/2104.08378.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep-mask `[O, K]` of the `n` highest of every `m` consecutive columns; among equals the last stay.

    `m` divides `K`.
    """
    groups = scores.reshape(-1, m)
    chosen = groups.argsort(dim=1, stable=True)[:, m - n :]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True).reshape(scores.shape)
