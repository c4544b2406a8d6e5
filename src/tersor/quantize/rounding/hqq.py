"""Half-quadratic quantization: fits the grid itself to the weights, without data, and forgives outliers.

Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/; half-quadratic splitting as in Geman & Reynolds 1992,
https://doi.org/10.1109/34.120331. ``min ‖W − Ŵ‖_p^p`` with ``p < 1`` is split by errors `E` that are taken from the
weight before the grid is fitted to the rest: ``min ‖E‖_p^p + β/2 ‖W − Ŵ − E‖²``, each half in closed form, `β` growing.

Shapes: `O` outputs (rows), `K` inputs (columns), `G` groups of a row, `R` groups in all, `N` weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError
from tersor.quantize.rounding.base import WeightGrid, rounded


def hqq(
    weight: Tensor,
    scheme: QuantScheme,
    groups: int = 1,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> tuple[WeightGrid, Tensor]:
    """Fits scales and zero points so that most weights err little, and rounds to nearest.

    From the whole range (`minmax`), with errors in units of its scale, it repeats, ``q`` the codes of now::

        E ← sign(δ) · max(|δ| − |δ|^(p−1) / β, 0),  δ = W − s (q − z)
        s, z ← least squares of W − E ≈ s (q − z);  β ← κ β

    The paper moves a real zero point under a fixed scale. Integer kernels want integer zero points, and moving one of
    those only moves which codes saturate; so ours is rounded to a code in every round, and the scale is fitted behind
    it. Each group keeps the best of all rounds, the start included: never worse than `minmax` in ``Σ |W − Ŵ|^p``.

    Args:
        weight: `[O, K]`.
        scheme: Affine; its bits and signs.
        groups: `G`, a divisor of `K`.
        p: Of the norm, above 0, at most 1; the smaller, the less outliers count.
        beta: `β` of the first round.
        kappa: How `β` grows.
        iterations: Rounds.

    Returns:
        The grid, and the weight rounded to it, `[O, K]` of the weight's type.

    Raises:
        ConfigError: if shapes do not fit, the scheme is symmetric, or a setting is out of range.
        NonFiniteError: for NaN or Inf.
    """
    if scheme.symmetric:
        raise ConfigError("hqq fits zero points, got a symmetric scheme; pass QuantScheme(symmetric=False)")
    if not 0 < p <= 1 or beta <= 0 or kappa <= 0 or iterations < 0:
        raise ConfigError(
            f"hqq: expected 0 < p <= 1, beta > 0, kappa > 0 and iterations >= 0, got {p=}, {beta=}, {kappa=} and "
            f"{iterations=}"
        )
    start = WeightGrid.fitted(weight, scheme, groups)
    unit, zero_point = start.scale.reshape(-1, 1), start.zero_point.reshape(-1, 1)
    weights = weight.detach().to(unit.dtype).reshape(len(unit), -1)

    def judged(scale: Tensor, zero_point: Tensor) -> list[Tensor]:
        """Scale, zero point and ``Σ |W − Ŵ|^p`` of each group, `[R, 1]`; errors of the real weight, so it is exact."""
        errors = (weights - rounded(weights, scale * unit, zero_point, scheme)) / unit
        return [scale, zero_point, errors.abs().pow(p).sum(1, keepdim=True)]

    rows, scale = weights / unit, torch.ones_like(unit)
    best = judged(scale, zero_point)
    for _ in range(iterations):
        codes = ((rows / scale).round() + zero_point).clamp(scheme.qmin, scheme.qmax)
        target = rows - _shrunk(rows - (codes - zero_point) * scale, beta, p)
        scale, zero_point = _least_squares(target, codes, scale, scheme)
        scale = scale.clamp(min=torch.finfo(unit.dtype).tiny / unit)
        beta *= kappa
        new = judged(scale, zero_point)
        best = [torch.where(new[2] < best[2], one, other) for one, other in zip(new, best, strict=True)]
    shape = start.scale.shape
    grid = WeightGrid(scheme, (best[0] * unit).reshape(shape), best[1].reshape(shape))
    return grid, grid.nearest(weight)


def _shrunk(errors: Tensor, beta: float, p: float) -> Tensor:
    """The proximal step of ``‖E‖_p^p``: small errors become 0, large ones stay."""
    size = errors.abs()
    return errors.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)


def _least_squares(target: Tensor, codes: Tensor, scale: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point, `[R, 1]`, of the line through codes and targets `[R, N]`; the scale for the rounded zero.

    Where codes do not tell a scale apart from none, or it would not be positive, the last one stays.
    """
    code, mean = codes.mean(1, keepdim=True), target.mean(1, keepdim=True)
    slope = ((codes - code) * (target - mean)).sum(1, keepdim=True) / (codes - code).square().sum(1, keepdim=True)
    slope = torch.where(slope > 0, slope, scale)  # NaN is not above 0 either
    zero_point = (code - mean / slope).round().clamp(scheme.qmin, scheme.qmax)
    steps = codes - zero_point
    fitted = (steps * target).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True)
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, scale), zero_point
