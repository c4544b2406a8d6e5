"""Unstructured pruning: zeroes single weights, N of M, or blocks of them.

Makes the model sparse, not faster: no runtime here has kernels that skip zeros. Han et al. 2015,
https://arxiv.org/abs/1506.02626; how much to keep where: https://arxiv.org/abs/2010.07611.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.prune import masks as keep_masks
from tersor.prune.encoding import encode
from tersor.prune.measured import measured_on
from tersor.prune.selection import Selection, install, select
from tersor.prune.sparsity import (
    Allocation,
    CriterionName,
    PatternName,
    Reconstruction,
    Share,
    Sparsity,
    measure,
)

NO_SPEED_UP = "no speed-up expected on this runtime: its kernels multiply the zeros as well; dense files stay as large"


class Settings(TypedDict, total=False):
    """Fields of `Sparsity`, as keyword arguments."""

    threshold: float | None
    criterion: str
    pattern: str
    allocation: Allocation
    floor: float
    reconstruct: Reconstruction | None


@dataclass(frozen=True)
class SparseLayer:
    """One weight: `sparsity` is its share of zeros by mask, `stored_bytes` its size if stored sparse."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    stored_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class SparsityReport:
    """A sparse model and what is known about it.

    Attributes:
        model: With zeros where the masks say so.
        masks: Parameter path -> boolean keep-mask of its shape.
        sparsity: Share of zeros over all weights (two or more dimensions), skipped ones included.
        layers: One row per weight.
        skipped: Parameter paths that stay dense, with the reason.
        stored_bytes: All parameters and buffers, sparse ones encoded (`tersor.prune.encoding`), measured.
        dense_bytes: The same without sparse encoding.
        notes: What a reader must know.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    sparsity: float
    layers: list[SparseLayer]
    skipped: list[tuple[str, str]]
    stored_bytes: int
    dense_bytes: int
    notes: list[str] = field(default_factory=list)

    def finalize(self) -> nn.Module:
        """Makes the masks permanent and returns the model; raises `ModelError` if they cannot hold."""
        return keep_masks.finalize(self.model, self.masks)


def unstructured(
    model: nn.Module,
    amount: float | None = None,
    *,
    data: Any = None,
    loss: Callable[[Any, Tensor | None], Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    inplace: bool = False,
    **settings: Unpack[Settings],
) -> SparsityReport:
    """Zeroes the least important weights of a copy of `model`.

    ```python
    report = tersor.prune.unstructured(model, 0.8)                                    # 80 % of all weights
    report = tersor.prune.unstructured(model, pattern="2:4", criterion="wanda", data=batches)
    report = tersor.prune.unstructured(model, 0.5, reconstruct="sparsegpt", data=batches)
    report = tersor.prune.unstructured(model, threshold=1e-3, criterion="l1")
    ```

    Args:
        model: Stays as it is unless `inplace`.
        amount: Share of the weights that goes, in [0, 1); 0.5 where nothing else decides. Not with `threshold`.
        data: For criteria and reconstructions that are measured: a split, one batch, or an iterable of batches.
        loss: For criteria from gradients: `(outputs, labels) -> scalar`.
        masks: Of an earlier round; what they removed stays removed and counts.
        inplace: Changes `model` itself.
        **settings: Further fields of `Sparsity`: `threshold`, `criterion` ("l1"), `pattern` ("unstructured", "2:4",
            "4x1"), `allocation` ("global", "uniform", "output", "erk" or amounts by glob pattern), `floor`,
            `reconstruct`.

    Raises:
        ConfigError: if a setting is wrong, or data or loss is missing.
        UnsupportedError: if there is nothing to prune.
    """
    wanted = Sparsity(amount=amount, **settings)
    evidence = measure(model, wanted, data, loss)
    selection = select(model, wanted, evidence=evidence, masks=masks)
    changed = model if inplace else copy.deepcopy(model)
    install(changed, selection)
    return _report(changed, selection, wanted, {path: about.output_dim for path, about in evidence.items()})


def _report(model: nn.Module, selection: Selection, settings: Sparsity, output_dims: dict[str, int]) -> SparsityReport:
    layers, rest = [], 0
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for path, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if tensor.ndim < 2 or not isinstance(tensor, nn.Parameter):
            rest += size
            continue
        mask = selection.masks.get(path)
        stored, share = size, 0.0
        if mask is not None:
            stored = len(encode(tensor, mask, settings.pattern_, output_dims.get(path, 0)))
            share = 1 - int(mask.sum()) / max(1, mask.numel())
        layers.append(SparseLayer(path, tuple(tensor.shape), share, stored, size))
    stored_bytes = rest + sum(layer.stored_bytes for layer in layers)
    dense_bytes = rest + sum(layer.dense_bytes for layer in layers)
    entries = sum(torch.Size(layer.shape).numel() for layer in layers)
    zeros = sum(int((~mask).sum()) for mask in selection.masks.values())
    notes = [
        f"{zeros:,} of {entries:,} weights ({zeros / max(1, entries):.1%}) are zero",
        f"{stored_bytes:,} bytes if stored sparse, {dense_bytes:,} dense",
        NO_SPEED_UP,
        *(f"{path} stays dense: {reason}" for path, reason in selection.skipped),
    ]
    return SparsityReport(
        model, selection.masks, zeros / max(1, entries), layers, selection.skipped, stored_bytes, dense_bytes, notes
    )


class Unstructured(Step):
    """Prunes the least important weights; the masks hold through later training.

    Settings as in `Sparsity`, with `sparsity` for its amount. Criteria and reconstructions that are measured look at
    `samples` examples of the calibrate split.
    """

    name: ClassVar[str] = "prune.unstructured"
    kind: ClassVar[Kind] = "prune"

    sparsity: Share | None = None
    threshold: float | None = None
    criterion: CriterionName = "l1"
    pattern: PatternName = "unstructured"
    allocation: Allocation = "global"
    floor: Share = 0.01
    reconstruct: Reconstruction | None = None
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Unstructured:
        decided = isinstance(self.allocation, dict) or ":" in self.pattern
        if self.sparsity is None and self.threshold is None and not decided:
            raise ValueError("expected a sparsity or a threshold")
        self.settings()
        return self

    def settings(self) -> Sparsity:
        """As what the functions take."""
        return Sparsity(
            amount=self.sparsity,
            threshold=self.threshold,
            criterion=self.criterion,
            pattern=self.pattern,
            allocation=self.allocation,
            floor=self.floor,
            reconstruct=self.reconstruct,
        )

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, where something is measured."""
        return frozenset({"calibrate"}) if self.settings().needs else frozenset()

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Computes masks on a copy and zeroes the weights."""
        started = time.perf_counter()
        fresh, settings = candidate.for_weights(), self.settings()
        evidence = measured_on(
            fresh.module, settings, context, self.name, samples=self.samples, batch_size=self.batch_size
        )
        selection = select(fresh.module, settings, evidence=evidence, masks=fresh.masks)
        install(fresh.module, selection)
        dims = {path: about.output_dim for path, about in evidence.items()}
        notes = _report(fresh.module, selection, settings, dims).notes
        seconds = time.perf_counter() - started
        return replace(fresh, masks=selection.masks).record(self.name, self.model_dump(mode="json"), seconds, notes)
