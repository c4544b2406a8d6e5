"""Unstructured pruning: zeroes single weights, ranked over the whole model.

Makes the model sparse, not faster: no runtime here has kernels that skip scattered zeros. Han et al. 2015,
https://arxiv.org/abs/1506.02626.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.errors import ConfigError, UnsupportedError
from tersor.prune import criteria


def unstructured_masks(
    module: nn.Module,
    sparsity: float,
    *,
    criterion: str = "magnitude",
    floor: float = 0.01,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep-masks under which a share `sparsity` of all weights is zero, the lowest scores first.

    Ranks the entries of every parameter with at least two dimensions together. Does not change `module`.

    Args:
        module: The model.
        sparsity: Share of zeros over all ranked weights, in [0, 1).
        criterion: A name from `prune.criteria`.
        floor: Share of every single weight tensor that is kept, so that no layer dies.
        masks: Entries that an earlier round removed; they stay removed and count towards `sparsity`.

    Returns:
        Parameter path -> boolean mask of its shape, True where kept.

    Raises:
        ConfigError: if a share is out of range or the criterion is unknown.
        UnsupportedError: if there is nothing to prune.
    """
    if not 0 <= sparsity < 1 or not 0 <= floor < 1:
        raise ConfigError(f"sparsity and floor must be in [0, 1), got {sparsity} and {floor}")
    if criterion not in criteria.__all__:
        raise ConfigError(f"criterion: expected one of {criteria.__all__}, got {criterion!r}")
    score = getattr(criteria, criterion)
    weights = {path: weight for path, weight in module.named_parameters() if weight.ndim >= 2}
    if not weights:
        raise UnsupportedError(
            f"{type(module).__name__} has no parameter with two or more dimensions: there is nothing to prune"
        )
    scores = {}
    for path, weight in weights.items():
        values = score(weight).flatten().float()
        gone = ~masks[path].flatten() if masks and path in masks else torch.zeros_like(values, dtype=torch.bool)
        kept = max(1, round(floor * len(values)))
        values[values.masked_fill(gone, -torch.inf).topk(kept).indices] = torch.inf
        scores[path] = values.masked_fill(gone, -torch.inf)
    ranked = torch.cat(list(scores.values()))
    already = int((ranked == -torch.inf).sum())
    removed = max(already, min(round(sparsity * len(ranked)), int((ranked < torch.inf).sum())))
    mask = torch.ones(len(ranked), dtype=torch.bool)
    mask[ranked.argsort(stable=True)[:removed]] = False
    parts = torch.split(mask, [len(values) for values in scores.values()])
    return {path: part.reshape(weights[path].shape) for path, part in zip(scores, parts, strict=True)}


class Unstructured(Step):
    """Prunes the globally least important weights; the masks hold through later training."""

    name: ClassVar[str] = "prune.unstructured"
    kind: ClassVar[Kind] = "prune"

    sparsity: float = Field(ge=0, lt=1)
    criterion: str = "magnitude"
    floor: float = Field(default=0.01, ge=0, lt=1)

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in criteria.__all__:
            raise ValueError(f"expected one of {criteria.__all__}")
        return name

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Computes masks on a copy and zeroes the weights."""
        started = time.perf_counter()
        fresh = candidate.for_weights()
        masks = unstructured_masks(
            fresh.module, self.sparsity, criterion=self.criterion, floor=self.floor, masks=fresh.masks
        )
        apply_masks(fresh.module, masks)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        notes = [
            f"{zeros:,} of {total:,} weights ({zeros / total:.1%}) are zero",
            "no speed-up expected: no runtime here skips scattered zeros; dense file sizes stay as well",
        ]
        seconds = time.perf_counter() - started
        return replace(fresh, masks=masks).record(self.name, self.model_dump(mode="json"), seconds, notes)
