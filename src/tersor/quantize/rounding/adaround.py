"""AdaRound: learns for each weight whether it is rounded up or down, so that the layer's outputs change little.

Nagel et al. 2020, https://arxiv.org/abs/2004.10568. The soft value of a weight is
``s · (clamp(⌊w / s⌋ + h(V) + z, qmin, qmax) − z)`` with the rectified sigmoid
``h(V) = clamp(σ(V) · (ζ − γ) + γ, 0, 1)``; the regularisation ``Σ 1 − |2 h(V) − 1|^β`` drives `h` to 0 or 1.

Shapes: `O` outputs (rows), `K` inputs (columns), `N` positions at which a layer was seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.quantize.formats.regions import working_dtype
from tersor.quantize.rounding.base import WeightGrid, check_parameters

ZETA, GAMMA = 1.1, -0.1
WARM_UP = 0.2  # share of the steps in which outputs alone count
HOT, COLD = 20.0, 2.0
LEARNING_RATE = 1e-2
STRENGTH = 10.0  # of the regularisation, against outputs in units of what rounding to nearest errs by


class SoftRounding(nn.Module):
    """A weight of any shape between the two grid points next to it, by a learnable `V` of its shape.

    Starts as the weight itself, where the codes reach that far.

    Args:
        weight: Any shape; float16, bfloat16, float32 or float64.
        scheme: Bits, signs and symmetry.
        scale: Broadcasts to the weight.
        zero_point: Broadcasts to the weight; whole numbers.

    Raises:
        ConfigError: if the shapes do not broadcast, or scales and zero points make no grid.
        NonFiniteError: for NaN or Inf.
    """

    scale: Tensor
    zero_point: Tensor
    floor: Tensor

    def __init__(self, weight: Tensor, scheme: QuantScheme, *, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        check_parameters(scheme, scale, zero_point)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"SoftRounding: a weight of shape {tuple(weight.shape)} holds NaN or Inf")
        for name, tensor in (("scale", scale), ("zero_point", zero_point)):
            lengths = zip(reversed(tensor.shape), reversed(weight.shape), strict=False)
            if tensor.ndim > weight.ndim or any(length not in {1, full} for length, full in lengths):
                raise ConfigError(
                    f"SoftRounding: {name} {tuple(tensor.shape)} does not broadcast to a weight {tuple(weight.shape)}"
                )
        self.scheme = scheme
        self.dtype = weight.dtype
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().to(scale.dtype, copy=True))
        precision = torch.promote_types(working_dtype(weight.dtype), scale.dtype)
        steps = weight.detach().to(precision) / self.scale
        steps = steps.clamp(min=scheme.qmin - self.zero_point, max=scheme.qmax - self.zero_point)
        self.register_buffer("floor", steps.floor())
        self.V = nn.Parameter(torch.logit((steps - self.floor - GAMMA) / (ZETA - GAMMA)))

    def forward(self) -> Tensor:
        """The soft value, of the weight's shape and type."""
        return self._values(self.floor + self.share())

    def hard(self) -> Tensor:
        """The grid points that `V` has decided for, of the weight's shape and type, without gradients."""
        return self._values(self.floor + (self.share() >= 0.5)).detach()

    def share(self) -> Tensor:
        """``h(V)``: how far up each weight is, 0 to 1."""
        return (self.V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def regularisation(self, beta: float) -> Tensor:
        """``Σ 1 − |2 h(V) − 1|^β``, a scalar: 0 once every weight has decided."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def _values(self, steps: Tensor) -> Tensor:
        codes = (steps + self.zero_point).clamp(self.scheme.qmin, self.scheme.qmax)
        return ((codes - self.zero_point) * self.scale).to(self.dtype)


def beta_at(step: int, total: int) -> float | None:
    """The β of a step: falls from 20 to 2 along a cosine; None in the first 20 %, without regularisation."""
    start = WARM_UP * total
    if step < start:
        return None
    return COLD + (HOT - COLD) * (1 + math.cos(math.pi * (step - start) / (total - start))) / 2


def adaround(
    weight: Tensor,
    inputs: Tensor,
    grid: WeightGrid,
    *,
    targets: Tensor | None = None,
    steps: int = 1000,
    batch: int = 256,
    seed: int = 0,
) -> Tensor:
    """Rounds a weight by descending on what its layer puts out for a sample of inputs.

    ``min_V ‖X Wᵥᵀ − Y‖² + λ Σ 1 − |2 h(V) − 1|^β``, each output in units of what rounding to nearest errs by. A row for
    which rounding to nearest errs less keeps that: on the sample, the result is never worse.

    Args:
        weight: `[O, K]`.
        inputs: `X`, `[N, K]`; of a layer that stands behind quantized ones, what it really gets.
        grid: What to round to.
        targets: `Y`, `[N, O]`, without bias; by default ``X Wᵀ``.
        steps: Of Adam.
        batch: Positions per step.
        seed: For the choice of positions.

    Returns:
        `[O, K]`, points of the grid in the weight's type; the same for the same seed.

    Raises:
        ConfigError: if the shapes do not fit.
        NonFiniteError: for NaN or Inf.
    """
    work, seen, missing = _problem(weight, inputs, grid, targets)
    if steps < 0 or batch < 1:
        raise ConfigError(f"adaround: expected steps >= 0 and batch >= 1, got {steps} and {batch}")
    nearest = grid.nearest(weight)
    error = _errors(nearest, work, seen, missing)
    unit = torch.where(error > 0, error / len(seen), torch.inf).sqrt().to(work.dtype)  # rows that do not err: no pull
    scale, zero_point = grid.expanded(work.shape[1])
    soft = SoftRounding(work, grid.scheme, scale=scale, zero_point=zero_point)
    optimizer = torch.optim.Adam([soft.V], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        part, gap = seen, missing
        if batch < len(seen):
            some = torch.randint(len(seen), (batch,), generator=generator).to(seen.device)
            part, gap = seen[some], None if missing is None else missing[some]
        with torch.enable_grad():
            residual = part @ (soft() - work).T
            if gap is not None:
                residual = residual - gap
            loss = (residual / unit).square().mean(0).sum()
            beta = beta_at(step, steps)
            if beta is not None:
                loss = loss + STRENGTH / work.shape[1] * soft.regularisation(beta)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    found = soft.hard().to(weight.dtype)
    return torch.where((_errors(found, work, seen, missing) < error)[:, None], found, nearest)


def _problem(
    weight: Tensor, inputs: Tensor, grid: WeightGrid, targets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight and inputs in the working precision, the inputs at most 1, and what the targets exceed ``X Wᵀ`` by."""
    grid.check(weight)
    rows, columns = weight.shape
    if inputs.ndim != 2 or inputs.shape[1] != columns or not len(inputs):
        raise ConfigError(f"adaround: expected inputs [N, {columns}], N > 0, got {tuple(inputs.shape)}")
    if targets is not None and targets.shape != (len(inputs), rows):
        raise ConfigError(f"adaround: expected targets [{len(inputs)}, {rows}], got {tuple(targets.shape)}")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"adaround: the {name} hold NaN or Inf; check the data and the model's weights")
    precision = torch.promote_types(working_dtype(weight.dtype), working_dtype(inputs.dtype))
    work, seen = weight.detach().to(precision), inputs.detach().to(precision)
    peak = seen.abs().max()
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    seen = seen / peak
    return work, seen, None if targets is None else targets.detach().to(precision) / peak - seen @ work.T


def _errors(found: Tensor, weight: Tensor, seen: Tensor, missing: Tensor | None) -> Tensor:
    """Of each row, ``Σ_n`` of the squared error of its output, `[O]` float64."""
    residual = seen @ (found.to(weight.dtype) - weight).T
    if missing is not None:
        residual = residual - missing
    return residual.double().square().sum(0)
