"""Repairs a layer while it is pruned, by its inputs' Gram matrix: pure mathematics on one weight matrix.

Everywhere: weight `[O, K]`, gram `[K, K]` (``X Xᵀ / n`` of the layer's inputs), error ``tr(Δ · gram · Δᵀ)``, which is
the mean squared error of the layer's outputs (`tersor.probe.hessian`).
"""

from tersor.prune.reconstruction import obc, sparsegpt
from tersor.prune.reconstruction.least_squares import refit

__all__ = ["obc", "refit", "sparsegpt"]
