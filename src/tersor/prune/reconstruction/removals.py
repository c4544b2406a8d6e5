"""What the unstructured reconstructions were asked to remove."""

from __future__ import annotations

from tersor.errors import ConfigError


def removals(columns: int, sparsity: float | None, n_m: tuple[int, int] | None) -> None:
    """Checks what was asked of the unstructured methods.

    Raises:
        ConfigError: unless exactly one of a sparsity in [0, 1) and a pattern (n, m), n of every m kept, is given.
    """
    if (sparsity is None) == (n_m is None):
        raise ConfigError(f"expected either sparsity or n_m, got sparsity={sparsity} and n_m={n_m}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be in [0, 1), got {sparsity}")
    if n_m is not None and (not 0 < n_m[0] <= n_m[1] or columns % n_m[1]):
        raise ConfigError(f"n_m={n_m}: expected 0 < n <= m, and m to divide the {columns} columns of the weight")
