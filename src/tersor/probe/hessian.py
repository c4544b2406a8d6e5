"""The Gram matrix as the Hessian of a layer's squared error, made invertible.

Damping by a share of the mean diagonal as in Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774.
Shapes: `O` outputs, `K` columns; Gram matrices may be stacked, `[…, K, K]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError

DAMPING = 0.01  # share of the mean diagonal


def damped_cholesky(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Lower Cholesky factor of ``gram + λ I``, float32 or better, `[…, K, K]`.

    ``λ = damping · mean(diag)``. Where that is not positive definite (no damping, fewer rows than columns), λ grows
    tenfold until it is. Dead inputs, whose diagonal is zero, get next to nothing instead of λ: they touch no other
    column, and losing them shall cost nothing.

    Raises:
        NonFiniteError: if the Gram matrix holds NaN or Inf.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("the Gram matrix holds NaN or Inf; check the data and the model's weights")
    gram = gram.detach().to(torch.promote_types(gram.dtype, torch.float32))
    least = 10 * float(torch.finfo(gram.dtype).eps)
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = torch.where(size > 0, size, torch.ones_like(size))
    scaled = gram / size  # unit mean diagonal: nothing overflows or vanishes
    dead = scaled.diagonal(dim1=-2, dim2=-1) <= least
    scaled = scaled + torch.diag_embed(dead * 2 * least)
    live = torch.diag_embed((~dead).to(gram.dtype))
    level = torch.full_like(size, damping)
    while True:
        factor, failed = torch.linalg.cholesky_ex(scaled + level * live)
        pivots = factor.diagonal(dim1=-2, dim2=-1).amin(-1)  # a vanishing pivot is rounding, not information
        failed = (failed > 0) | ~(pivots.square() > least / 10)
        if not bool(failed.any()):
            root: Tensor = factor * size.sqrt()
            return root
        level = torch.where(failed[..., None, None], (level * 10).clamp_min(least), level)


def damped_inverse(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """``(gram + λ I)⁻¹``, `[…, K, K]`; λ as in `damped_cholesky`."""
    return torch.cholesky_inverse(damped_cholesky(gram, damping))


def inverse_upper(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper factor `U` of ``(gram + λ I)⁻¹ = Uᵀ U``, `[K, K]`; never forms the inverse, so it cannot fail."""
    factor = damped_cholesky(gram.flip(0, 1), damping).flip(0, 1)  # gram + λI = factor · factorᵀ, factor upper
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    upper: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return upper


def output_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """``E‖W x − W' x‖² = tr(Δ · gram · Δᵀ)`` for weights `[O, K]`."""
    change = (before - after).double()
    return float(((change @ gram.double()) * change).sum())


def checked(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight in the working precision, a copy.

    Raises:
        ConfigError: if the shapes do not fit.
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigError(
            f"expected a weight [O, K] and a gram [K, K], got {tuple(weight.shape)} and {tuple(gram.shape)}; "
            "see a convolution as a matrix with flatten(1), and take its groups one by one"
        )
    precision = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
    return weight.detach().to(precision, copy=True)
