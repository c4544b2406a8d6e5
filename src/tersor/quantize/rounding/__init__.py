"""Weight rounding: how a weight matrix finds its points on a grid of integer codes. Pure mathematics on tensors.

Everywhere: weight `[O, K]`, gram `[K, K]` (``X Xᵀ / n`` of the layer's inputs), error ``tr(Δ · gram · Δᵀ)``, which is
the mean squared error of the layer's outputs (`tersor.probe.hessian`). One small file each, with formula and paper.
"""

from tersor.quantize.rounding.adaround import SoftRounding, adaround, beta_at
from tersor.quantize.rounding.awq import awq_scale
from tersor.quantize.rounding.base import WeightGrid
from tersor.quantize.rounding.gptq import gptq
from tersor.quantize.rounding.hqq import hqq
from tersor.quantize.rounding.obq import obq

__all__ = ["SoftRounding", "WeightGrid", "adaround", "awq_scale", "beta_at", "gptq", "hqq", "obq"]
