"""Quantizers that learn: the step size (LSQ), the offset too (LSQ+), or the clipping level (PACT).

Shapes: `K` channels, 1 for a whole tensor.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.quantization import QuantScheme
from tersor.graph.fake_quantize import SMALLEST_SCALE, FakeQuantize, rounded_to

Method = Literal["lsq", "lsq+", "pact"]

LARGEST_GRADIENT = 1.0  # a step of SGD changes no step size by more than the learning rate, as a share
SLACK = 1e-4  # of a step: a value that was rounded to the outermost code before is not beyond it
SMALLEST_SHARE = 1e-2  # of a layer's mean step size; an empty channel starts with it, since its own step means nothing


class LearnedStep(nn.Module):
    """Rounds like `FakeQuantize` and learns with what step ``s`` and zero point ``z``.

    ``x̂ = s · (clamp(round(x / s) + z, qmin, qmax) − z)``, with ``x = (low, high) = s · (qmin − z, qmax − z)`` the
    range. The gradient passes to ``x`` inside of the range and is zero outside. Then, with ``h = ∂L/∂x̂``:

    - ``lsq`` learns the step: ``∂L/∂s = Σ h · (x̂ − x) / s`` over what lies inside, ``+ Σ h · x̂ / s`` outside;
    - ``lsq+`` learns the offset ``β = −s · z`` too: ``∂L/∂β = Σ h`` outside;
    - ``pact`` learns the level ``α = s · (qmax − z)`` above which values are clipped: ``∂L/∂α = Σ h`` over ``x > α``.
      If there are values below zero, ``low`` moves along with it.

    What is stored is ``log s``, so that no step ever becomes zero or negative, and ``z`` as a float that is rounded in
    use: unlike LSQ+'s free offset it gives what integer kernels compute. Their gradients are
    ``c · ∂L/∂s / s`` and ``−c · ∂L/∂β / s``: a small step of plain SGD then changes ``s`` and ``β`` just as the papers'
    would, while AdamW's steps become relative ones. ``c`` is LSQ's ``1 / sqrt(N · qmax)``, with `N` values per step
    of one example; for PACT ``1 / (qmax − z)²``, which makes it a plain step of ``α``, and `decay` pulls ``α`` to zero.
    Both are bounded by 1: where a channel has few weights, or eight bits, the papers' steps can grow without limit.

    Esser et al. 2020, https://arxiv.org/abs/1902.08153; Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576; Choi et
    al. 2018, https://arxiv.org/abs/1805.06085.

    Args:
        quantizer: Calibrated; gives format, step and zero point to start from.
        method: What is learned.
        decay: PACT's regularisation: ``decay · α`` is added to ``∂L/∂α``.
    """

    offset: Tensor

    def __init__(self, quantizer: FakeQuantize, method: Method, *, decay: float = 0.0) -> None:
        super().__init__()
        self.scheme = quantizer.scheme
        self.method = method
        self.decay = decay if method == "pact" else 0.0
        scale = quantizer.scale.detach().clone()
        smallest = max(SMALLEST_SHARE * float(scale.mean()), SMALLEST_SCALE)
        self.log_scale = nn.Parameter(scale.clamp(min=smallest).log())
        self.learns_offset = method == "lsq+" and not quantizer.scheme.symmetric
        offset = quantizer.zero_point.detach().float()
        if self.learns_offset:
            self.offset = nn.Parameter(offset)
        else:
            self.register_buffer("offset", offset)

    @property
    def scale(self) -> Tensor:
        """The step ``s`` `[K]`, detached."""
        return self.log_scale.detach().exp()

    @property
    def zero_point(self) -> Tensor:
        """The zero point ``z`` `[K]` as int32, detached."""
        return self.offset.detach().round().clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int32)

    def forward(self, values: Tensor) -> Tensor:
        """Rounds `values` of any shape."""
        rounded: Tensor = _Rounding.apply(values, self.log_scale, self.offset, self)  # type: ignore[no-untyped-call]
        return rounded

    def narrow(self, scheme: QuantScheme, ratio: Tensor, zero_point: Tensor) -> None:
        """Goes over to a narrower format, in place.

        Args:
            scheme: The new format.
            ratio: What the step is multiplied by, `[K]`.
            zero_point: The new one `[K]`, unless it is learned: then the one so far keeps its place in the range.
        """
        with torch.no_grad():
            self.log_scale.add_(ratio.log())
            if self.learns_offset:
                self.offset.mul_(scheme.qmax / self.scheme.qmax)
            else:
                self.offset.copy_(zero_point)
        self.scheme = scheme

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"bits={self.scheme.bits}, channels={len(self.log_scale)}, method={self.method}"


class _Rounding(torch.autograd.Function):
    """The formulas of `LearnedStep`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, log_scale: Tensor, offset: Tensor, step: LearnedStep) -> Tensor:
        scale, zero_point = step.scale, step.zero_point
        ctx.step, ctx.scheme = step, step.scheme
        ctx.save_for_backward(values, scale, zero_point)
        return rounded_to(values, scale, zero_point, step.scheme)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        values, scale, zero_point = ctx.saved_tensors
        step, scheme = ctx.step, ctx.scheme
        passed = _inside(gradient, values, scale, zero_point, scheme)
        error = rounded_to(values, scale, zero_point, scheme)
        if step.method == "pact":
            error.mul_(gradient - passed)
        else:  # rounding error inside, the outermost level outside
            error.mul_(gradient).addcmul_(values, passed, value=-1)
        reduce = [axis for axis in range(values.ndim) if axis != scheme.axis]
        factor = _gradient_factor(step, values, zero_point)
        log_gradient = _bounded(error.sum(reduce).reshape(-1) * factor / scale.square() + step.decay)
        offset_gradient = None
        if ctx.needs_input_grad[2]:
            offset_gradient = _bounded(-(gradient - passed).sum(reduce).reshape(-1) * factor / scale)
        return passed, log_gradient, offset_gradient, None


def _inside(gradient: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """The gradient where the values lie in the range, zero elsewhere."""
    low, high = (scheme.qmin - SLACK - zero_point) * scale, (scheme.qmax + SLACK - zero_point) * scale
    if scheme.axis is None:
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, values, float(low), float(high))
        return passed
    shape = [-1 if axis == scheme.axis else 1 for axis in range(values.ndim)]
    return gradient * ((values > low.reshape(shape)) & (values < high.reshape(shape)))


def _bounded(gradient: Tensor) -> Tensor:
    return gradient.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)


def _gradient_factor(step: LearnedStep, values: Tensor, zero_point: Tensor) -> Tensor | float:
    scheme = step.scheme
    if step.method == "pact":
        return 1 / torch.maximum(scheme.qmax - zero_point, zero_point - scheme.qmin).float().square()
    count = values.numel() / (len(zero_point) if scheme.axis is not None else max(len(values), 1))
    return 1 / math.sqrt(max(count, 1) * scheme.qmax)
