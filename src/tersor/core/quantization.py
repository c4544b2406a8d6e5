"""Declarative quantization: the number format of a tensor, and the plan for a whole model."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tersor.core.config import Config


class QuantScheme(Config):
    """A uniform integer format: ``q = clamp(round(x / scale) + zero_point)`` (Jacob et al. 2018).

    `axis` is the channel dimension that has one scale per index, None for one scale per tensor.
    See https://arxiv.org/abs/1712.05877.
    """

    bits: int = Field(default=8, ge=2, le=8)
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


class TensorQuant(Config):
    """One quantized tensor: its format, its scales and where it stands in the model."""

    name: str = Field(description="parameter path for a weight, graph value for an activation")
    role: Literal["weight", "activation"]
    scheme: QuantScheme
    scale: list[float]
    zero_point: list[int]
    module: str = Field(default="", description="path of the module that computes with it")

    def rounded(self, values: Tensor) -> Tensor:
        """`values` moved to the nearest points of the grid."""
        shape = [-1 if axis == self.scheme.axis else 1 for axis in range(values.ndim)]
        scale = torch.tensor(self.scale, dtype=values.dtype).reshape(shape)
        zero_point = torch.tensor(self.zero_point).reshape(shape)
        codes = ((values / scale).round() + zero_point).clamp(self.scheme.qmin, self.scheme.qmax)
        return (codes - zero_point) * scale


class QuantPlan(Config):
    """Everything that quantization did to a model, as data.

    A weight's scale is in units of the stored parameter, so it holds before BatchNorm is folded.
    """

    tensors: list[TensorQuant]

    @property
    def weights(self) -> dict[str, TensorQuant]:
        """The quantized parameters by path."""
        return {tensor.name: tensor for tensor in self.tensors if tensor.role == "weight"}
