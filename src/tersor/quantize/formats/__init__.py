"""Number formats: each takes a tensor and returns it as `Quantized`. One small file each, with formula and paper."""

from tersor.quantize.formats.codebook import codebook
from tersor.quantize.formats.floats import bfloat16, float8, float16
from tersor.quantize.formats.normal_float import normal_float
from tersor.quantize.formats.powers import additive_powers_of_two, power_of_two
from tersor.quantize.formats.quantized import Quantized
from tersor.quantize.formats.uniform import uniform

__all__ = [
    "Quantized",
    "additive_powers_of_two",
    "bfloat16",
    "codebook",
    "float8",
    "float16",
    "normal_float",
    "power_of_two",
    "uniform",
]
