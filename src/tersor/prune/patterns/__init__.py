"""Sparsity patterns: each a function from scores `[O, K]` to keep-masks `[O, K]`, True where kept."""

from tersor.prune.patterns.base import as_matrix, columns_of, from_matrix
from tersor.prune.patterns.block import block
from tersor.prune.patterns.n_m import n_m
from tersor.prune.patterns.pattern import Pattern, pattern_of
from tersor.prune.patterns.unstructured import per_output, unstructured

__all__ = [
    "Pattern",
    "as_matrix",
    "block",
    "columns_of",
    "from_matrix",
    "n_m",
    "pattern_of",
    "per_output",
    "unstructured",
]
