"""How a runtime wants its graph quantized. Measured: benchmarks/results and docs/runtimes.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tersor.core.machine import saturates_int8
from tersor.core.target import Target
from tersor.graph.rules import TRANSPOSED


@dataclass(frozen=True)
class Style:
    """What differs between runtimes.

    Attributes:
        signed_products: Operands of a product of two activations are int8 without zero point, except softmax's.
        reduced_weights: Weights keep to 7 bits, since int8 kernels overflow.
        without_kernel: Operators that would run in float, around codes that are decoded at every call.
    """

    signed_products: bool = False
    reduced_weights: bool = False
    without_kernel: frozenset[Any] = frozenset()


def style_for(target: Target) -> Style:
    """The style of the target's runtime on this machine; runtimes of others get the plain one."""
    reduce = saturates_int8() if target.reduce_range is None else target.reduce_range
    if target.runtime == "openvino":
        return Style(signed_products=True, reduced_weights=reduce)
    if target.runtime == "onnxruntime":
        return Style(reduced_weights=reduce, without_kernel=TRANSPOSED)
    return Style(reduced_weights=reduce)
