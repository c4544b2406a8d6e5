"""Quantization: number formats, ranges, placement, and the steps that use them.

The formats are functions on tensors: `tersor.quantize.uniform(tensor, bits=8)`.
"""

from tersor.core.granularity import Granularity
from tersor.quantize.allocation import allocate
from tersor.quantize.dynamic import Dynamic
from tersor.quantize.fallback import Fallback
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
from tersor.quantize.functions import QuantizedModel, dynamic, qat, static, weight_only
from tersor.quantize.half import Half
from tersor.quantize.mixed import Mixed
from tersor.quantize.qat import Qat
from tersor.quantize.sensitivity import sensitivity
from tersor.quantize.static import Static
from tersor.quantize.weight_only import WeightOnly

__all__ = [
    "Dynamic",
    "Fallback",
    "Granularity",
    "Half",
    "Mixed",
    "Qat",
    "Quantized",
    "QuantizedModel",
    "Static",
    "WeightOnly",
    "additive_powers_of_two",
    "allocate",
    "bfloat16",
    "codebook",
    "dynamic",
    "float8",
    "float16",
    "normal_float",
    "power_of_two",
    "qat",
    "sensitivity",
    "static",
    "uniform",
    "weight_only",
]
