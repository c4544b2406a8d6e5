"""Quantization: number formats, ranges, placement, and the steps that use them.

The formats are functions on tensors: `tersor.quantize.uniform(tensor, bits=8)`.
"""

from tersor.core.granularity import Granularity
from tersor.quantize.formats import (
    Quantized,
    additive_powers_of_two,
    bfloat16,
    codebook,
    float8,
    float16,
    normal_float,
    power_of_two,
    uniform,
)
from tersor.quantize.static import Static

__all__ = [
    "Granularity",
    "Quantized",
    "Static",
    "additive_powers_of_two",
    "bfloat16",
    "codebook",
    "float8",
    "float16",
    "normal_float",
    "power_of_two",
    "uniform",
]
