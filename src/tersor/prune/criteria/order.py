"""The place in line: what stays is a prefix. Yu & Huang 2019, https://arxiv.org/abs/1903.05134.

``U − u`` for unit `u` of `U`: the last goes first. For networks whose units stand in the order of their importance and
were trained to be cut behind any of them, as `distill.once_for_all` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.graph.coupling.family import Family
from tersor.prune.criteria.base import Criterion


def units(family: Family) -> Tensor:
    """How many units stand from here to the end."""
    return torch.arange(family.size, 0, -1, dtype=torch.float64)


order = Criterion(name="order", units=units)
