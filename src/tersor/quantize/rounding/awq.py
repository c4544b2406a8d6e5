"""AWQ: scales up the columns that large inputs meet before rounding, and the inputs down. Data decide how far.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. With ``y = (W · s) (x / s)``, a column that is scaled up errs by
less of itself. Searched is the exponent of ``s = m^a``, `m` the mean magnitude of the inputs.

Shapes: `O` outputs (rows), `K` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import checked, output_error
from tersor.quantize.formats.regions import working_dtype
from tersor.quantize.rounding.base import matrix

LEAST = 1e-4  # magnitudes below this share of the largest count as it: dead inputs shall not blow up the scale


def awq_scale(
    weight: Tensor | Sequence[Tensor],
    magnitude: Tensor,
    gram: Tensor,
    quantize: Callable[[Tensor], Tensor],
    *,
    grid: int = 20,
) -> Tensor:
    """The scale of the columns with which rounding changes the outputs least.

    ``min_a tr(Δ · gram · Δᵀ)``, ``Δ = quantize(W · s) / s − W``, over ``s = m^a / √(max m^a · min m^a)``, `a` evenly
    from 0 to 1. ``a = 0`` is ``s = 1``, so the result is never worse than no scaling. Takes `grid` roundings and
    ``O(grid · O · K²)``.

    Args:
        weight: `[O, K]`, or several that share their input: one scale for all, their errors added.
        magnitude: Mean of ``|x|`` per column, `[K]`.
        gram: `[K, K]`, ``X Xᵀ / n`` of the layer's inputs.
        quantize: Rounds a weight; called with each of them, scaled.
        grid: How many exponents are tried.

    Returns:
        `s`, `[K]`, float32 or float64. Multiply the columns by it, and divide the inputs.

    Raises:
        ConfigError: if shapes do not fit, magnitudes are negative, or `grid` is below 1.
        NonFiniteError: for NaN or Inf.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    _check(weights, magnitude, gram, grid)
    precision = torch.promote_types(working_dtype(weights[0].dtype), working_dtype(magnitude.dtype))
    size = magnitude.detach().to(precision)
    size = torch.where(size.max() > 0, size, torch.ones_like(size))
    logarithm = size.clamp(min=LEAST * float(size.max())).log()
    logarithm = logarithm - (logarithm.max() + logarithm.min()) / 2
    best, least = torch.ones_like(size), torch.inf
    for exponent in torch.linspace(0, 1, grid, dtype=torch.float64).tolist():
        scale = (exponent * logarithm).exp()
        error = sum(_error(one, scale, gram, quantize) for one in weights)
        if error < least:
            best, least = scale, error
    return best


def _error(weight: Tensor, scale: Tensor, gram: Tensor, quantize: Callable[[Tensor], Tensor]) -> float:
    weight = weight.detach()
    found = quantize((weight * scale).to(weight.dtype))
    if found.shape != weight.shape:
        raise ConfigError(f"awq_scale: quantize made {tuple(found.shape)} of a weight {tuple(weight.shape)}")
    return output_error(weight, found.detach() / scale, gram)


def _check(weights: list[Tensor], magnitude: Tensor, gram: Tensor, grid: int) -> None:
    if grid < 1 or not weights:
        raise ConfigError(f"awq_scale: expected a weight and grid >= 1, got {len(weights)} weights and grid={grid}")
    for weight in weights:
        checked(matrix(weight, "awq_scale"), gram)
    if magnitude.shape != gram.shape[:1]:
        raise ConfigError(
            f"awq_scale: expected one magnitude per column, [{len(gram)}], got {tuple(magnitude.shape)}; take the mean "
            "of |x| over everything but the features"
        )
    for name, tensor in [*(("weight", weight) for weight in weights), ("magnitude", magnitude), ("gram", gram)]:
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"awq_scale: the {name} holds NaN or Inf; check the data and the model's weights")
    if bool((magnitude < 0).any()):
        raise ConfigError(f"awq_scale: magnitudes must not be negative, got {float(magnitude.min())}")
