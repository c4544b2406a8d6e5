"""The operator that lowered graphs contain; `runtimes.onnx_export` maps it to ONNX's QuantizeLinear and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# `Library` instead of `custom_op`: a third of the dispatch cost, and exporting traces it a hundred times.
_LIBRARY: Any = torch.library.Library("tersor", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("quantize_dequantize(Tensor values, Tensor scale, Tensor zero_point) -> Tensor")


def _quantize_dequantize(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``scale * (clamp(round(x / scale) + zero_point) - zero_point)`` in the integer type of `zero_point` (scalar)."""
    limits = torch.iinfo(zero_point.dtype)
    codes = ((values / scale).round() + zero_point).clamp(limits.min, limits.max)
    return (codes - zero_point) * scale


_LIBRARY.impl("quantize_dequantize", _quantize_dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("tersor::quantize_dequantize", lambda values, *_: torch.empty_like(values), lib=_LIBRARY)

quantize_dequantize = torch.ops.tersor.quantize_dequantize.default
