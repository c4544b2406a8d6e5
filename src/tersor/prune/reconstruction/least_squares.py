"""Refits what is left of a layer after whole columns went, by least squares.

The group form of optimal brain surgeon (Hassibi & Stork 1992), used per layer by Kurtic et al. 2023,
https://arxiv.org/abs/2302.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import ConfigError
from tersor.probe.hessian import DAMPING, checked, damped_cholesky


def refit(weight: Tensor, gram: Tensor, kept: Tensor | Sequence[int], damping: float = DAMPING) -> Tensor:
    """``W[:, kept] + W[:, gone] · gram[gone, kept] · (gram[kept, kept] + λ I)⁻¹``.

    The remaining columns for which ``E‖W x − W' x_kept‖² + λ ‖W' − W[:, kept]‖²`` is least: never worse than leaving
    them as they were, with ``damping = 0`` the least-squares fit.

    Args:
        weight: `[O, K]`.
        gram: `[K, K]`.
        kept: Indices of the columns that stay, in the order in which they are wanted.
        damping: λ as a share of the mean diagonal of ``gram[kept, kept]``; more where that is singular.

    Returns:
        `[O, len(kept)]`, of the weight's type.

    Raises:
        ConfigError: if shapes or indices do not fit.
    """
    work = checked(weight, gram)
    columns = weight.shape[1]
    chosen = torch.as_tensor(kept, dtype=torch.int64, device=weight.device)
    if chosen.ndim != 1 or len(set(chosen.tolist())) != len(chosen) or bool(((chosen < 0) | (chosen >= columns)).any()):
        raise ConfigError(f"kept must be distinct column indices below {columns}, got {chosen.tolist()[:8]} …")
    gone = torch.ones(columns, dtype=torch.bool, device=weight.device)
    gone[chosen] = False
    if not len(chosen) or not bool(gone.any()):
        return weight.detach()[:, chosen]
    factor = damped_cholesky(gram[chosen][:, chosen].to(work.dtype), damping)
    share = torch.cholesky_solve(gram[chosen][:, gone].to(work.dtype), factor)  # [kept, gone]
    return (work[:, chosen] + work[:, gone] @ share.T).to(weight.dtype)
