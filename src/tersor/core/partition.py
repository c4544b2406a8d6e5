"""Splits one dataset into disjoint, seeded, stratified parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tersor.core.split import Split
from tersor.errors import ConfigError, DataError

ROLES = ("train", "calibrate", "search", "certify", "report")
Positions = np.ndarray[Any, np.dtype[np.int64]]


def partition(whole: Split, shares: Mapping[str, float], seed: int) -> dict[str, Positions]:
    """Positions of each role's examples, sorted.

    Stratified where the labels are single integers with at least two examples per class. Identical examples
    count as one and stay together, so no split knows another's pictures.

    Raises:
        ConfigError: for unknown roles, shares outside 0..1 or a sum above 1.
        DataError: if a part would be empty.
    """
    unknown = set(shares) - set(ROLES)
    if unknown:
        raise ConfigError(f"fractions: expected roles of {list(ROLES)}, got {sorted(unknown)}")
    if any(not 0 < share <= 1 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise ConfigError(f"fractions must each be in (0, 1] and sum to at most 1, got {dict(shares)}")
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, key in enumerate(whole.keys):
        groups[key].append(position)
    strata: dict[int, list[list[int]]] = defaultdict(list)
    labels = _integer_labels(whole)
    for members in groups.values():
        strata[0 if labels is None else int(labels[members[0]])].append(members)

    generator = np.random.default_rng(seed)
    names, weights = list(shares), np.array(list(shares.values()))
    parts: dict[str, list[int]] = {name: [] for name in names}
    for label in sorted(strata):
        shuffled = [strata[label][index] for index in generator.permutation(len(strata[label]))]
        # Largest-remainder rounding with a random offset keeps both every class and the totals in proportion.
        cuts = np.floor(np.cumsum(weights) * len(shuffled) + generator.random()).astype(int)
        start = 0
        for name, end in zip(names, np.minimum(cuts, len(shuffled)), strict=True):
            parts[name].extend(position for group in shuffled[start:end] for position in group)
            start = max(start, int(end))
    empty = [name for name in names if not parts[name]]
    if empty:
        raise DataError(
            f"{len(whole)} examples are too few: split(s) {empty} would be empty with fractions {dict(shares)}"
        )
    return {name: np.sort(np.array(positions, dtype=np.int64)) for name, positions in parts.items()}


def _integer_labels(whole: Split) -> torch.Tensor | None:
    first = whole.batch([0]).labels
    if first is None or first.ndim != 1 or first.is_floating_point():
        return None
    labels = whole.labels
    assert labels is not None  # noqa: S101 - the first example has one
    return labels if bool((torch.unique(labels, return_counts=True)[1] > 1).all()) else None
