"""Declarative quantization: the number format of a tensor, and the plan for a whole model."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tersor.core.config import Config
from tersor.core.granularity import Granularity


class QuantScheme(Config):
    """A uniform integer format: ``q = clamp(round(x / scale) + zero_point)`` (Jacob et al. 2018).

    Which entries share a scale: all (the default); with `axis`, those of one index along this dimension (a channel);
    with `axis` and `group_size`, so many neighbours along it; with `group_size` alone, so many consecutive entries;
    with `per_token`, those of one vector along the last dimension. See https://arxiv.org/abs/1712.05877.
    """

    bits: int = Field(default=8, description="2 to 8, or 16")
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    group_size: int | None = Field(default=None, ge=1)
    per_token: bool = False

    @field_validator("bits")
    @classmethod
    def _has_kernels(cls, bits: int) -> int:
        if not 2 <= bits <= 8 and bits != 16:
            raise ValueError("expected 2 to 8 bits, or 16")
        return bits

    @model_validator(mode="after")
    def _one_granularity(self) -> Self:
        if self.per_token and (self.axis is not None or self.group_size is not None):
            raise ValueError(
                f"per_token is one scale per vector, which leaves no room for axis {self.axis} and group_size "
                f"{self.group_size}; set one of them"
            )
        return self

    @property
    def granularity(self) -> Granularity:
        """Which entries share a scale."""
        if self.per_token:
            return Granularity.token()
        if self.group_size is not None:
            return (
                Granularity.block(self.group_size)
                if self.axis is None
                else Granularity.group(self.group_size, self.axis)
            )
        return Granularity() if self.axis is None else Granularity.channel(self.axis)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def parameters(self, low: Tensor, high: Tensor, *, smallest: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point, as floats, with which the codes cover `[low, high]` and zero.

        Symmetric: the larger magnitude over `qmax`, zero has code 0. Affine: the width over all codes.
        No scale is below `smallest`: one of zero would silently erase what it scales.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-low, high) / self.qmax).clamp(min=smallest)
            return scale, torch.zeros_like(scale)
        codes = self.qmax - self.qmin
        scale = (high / codes - low / codes).clamp(min=smallest)  # the width itself may be too large for its type
        return scale, (self.qmin - low / scale).round().clamp(self.qmin, self.qmax)


class TensorQuant(Config):
    """One quantized tensor: its format, its scales and where it stands in the model.

    The scales are those of the deployed graph, in which BatchNorm is folded, in the order of `Granularity.rows`.
    """

    name: str = Field(description="parameter path for a weight, graph value for an activation")
    role: Literal["weight", "activation"]
    scheme: QuantScheme
    scale: list[float]
    zero_point: list[int]
    module: str = Field(default="", description="path of the module that computes with it")


Mode = Literal["static", "dynamic", "weight_only", "float16", "bfloat16"]
HALF_BITS = 16


class QuantPlan(Config):
    """Everything that quantization did to a model, as data.

    `mode` says what happens to activations: rounded with fixed scales, with scales found at run time, or not at all;
    or it names the shorter float type that the parameters in `casts` are stored in. With `pack`, weights of at most 4
    bits are stored as such; otherwise every code takes the byte that fast kernels want.
    """

    tensors: list[TensorQuant]
    mode: Mode = "static"
    pack: bool = False
    casts: list[str] = Field(default_factory=list)

    @property
    def weights(self) -> dict[str, TensorQuant]:
        """The quantized parameters by path."""
        return {tensor.name: tensor for tensor in self.tensors if tensor.role == "weight"}

    @property
    def precision(self) -> str:
        """What the target must be able to run, as in `Runtime.formats`: e.g. `int8`, `int4-weights`."""
        packed = self.pack and any(tensor.scheme.bits <= 4 for tensor in self.weights.values())
        return precision_name(self.mode, packed=packed)

    @property
    def stored(self) -> dict[str, str]:
        """Number format of each parameter that is stored in fewer bits, by path."""
        formats = {path: f"int{tensor.scheme.bits}" for path, tensor in self.weights.items()}
        return formats | dict.fromkeys(self.casts, self.mode)

    @property
    def weight_bits(self) -> int | None:
        """Bits of the widest weight that has fewer than 32; None if there is none."""
        bits = [tensor.scheme.bits for tensor in self.weights.values()] + [HALF_BITS] * bool(self.casts)
        return max(bits, default=None)


def precision_name(mode: Mode, *, packed: bool) -> str:
    """The name of a mode and the type that its weights are stored in."""
    if mode == "float16" or mode == "bfloat16":
        return f"{mode}-weights"
    suffix = {"static": "", "dynamic": "-dynamic", "weight_only": "-weights"}[mode]
    return ("int4" if packed else "int8") + suffix
