"""Fake quantization: rounds a tensor to an integer grid and returns it as float, with straight-through gradients.

Shapes: `K` channels, 1 for a whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.core.quantization import QuantScheme
from tersor.errors import UnsupportedError

SMALLEST_SCALE = 1e-9  # a scale of zero would silently erase a channel


class FakeQuantize(nn.Module):
    """``scale · (clamp(round(x / scale) + zero_point, qmin, qmax) − zero_point)``, Jacob et al. 2018.

    While `enabled` is False it is the identity. See https://arxiv.org/abs/1712.05877.

    Raises:
        UnsupportedError: for 16 bits, groups, blocks and tokens.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        if scheme.bits > 8 or scheme.granularity.kind not in {"tensor", "channel"}:
            raise UnsupportedError(
                f"fake quantization takes 2 to 8 bits, per tensor or per channel; got {scheme.bits} bits "
                f"{scheme.granularity}. tersor.quantize.uniform simulates every scheme on a tensor"
            )
        self.scheme = scheme
        self.enabled = False
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Sets scale and zero point so that `[low, high]` (each `[K]`) and zero are representable, and enables.

        Symmetric schemes take the larger magnitude over `qmax`, so that zero has code 0 exactly.
        """
        low, high = low.detach().float().cpu(), high.detach().float().cpu()
        scale, zero_point = self.scheme.parameters(low, high, smallest=SMALLEST_SCALE)
        self.scale = scale.reshape(-1)
        self.zero_point = zero_point.to(torch.int32).reshape(-1)
        self.enabled = True

    def forward(self, values: Tensor) -> Tensor:
        """Rounds `values` of any shape to the grid."""
        if not self.enabled:
            return values
        scheme = self.scheme
        if scheme.axis is None and values.requires_grad and torch.is_grad_enabled():  # it knows the gradient
            return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, scheme.qmin, scheme.qmax)
        return rounded_to(values, self.scale, self.zero_point, scheme)

    def codes(self, values: Tensor) -> Tensor:
        """The integer codes of `values`, as int8 or uint8: those that `forward` rounds to, halves included.

        PyTorch's kernels multiply by ``1 / scale``, so ``x / scale`` alone would round some halves the other way.
        """
        shape = [-1 if axis == self.scheme.axis else 1 for axis in range(values.ndim)]
        scale, zero_point = self.scale.reshape(shape), self.zero_point.reshape(shape)
        rounded: Tensor = self(values.detach())
        codes = (rounded / scale).round() + zero_point
        return codes.clamp(self.scheme.qmin, self.scheme.qmax).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the codes."""
        return torch.int8 if self.scheme.signed else torch.uint8

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"bits={self.scheme.bits}, channels={len(self.scale)}, enabled={self.enabled}"


def rounded_to(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """`values` of any shape on the grid of `scale` and `zero_point`, each `[K]`; without gradients for whole tensors.

    For these PyTorch's kernel computes the same, but takes about ten times as long on a CPU.
    """
    if scheme.axis is not None:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, scheme.axis, scheme.qmin, scheme.qmax)
    step, offset = scale.reshape(()), int(zero_point)
    codes = values.mul(1 / step).round_().clamp_(scheme.qmin - offset, scheme.qmax - offset)
    return codes.mul_(step)
