"""The reference that a pruned model must equal: the original with the removed units masked.

Masked means: every entry of every parameter that belongs to a removed unit is zero. Where a statistic runs over a
dimension that is cut - a layer norm, a mean over channels, a sum of products of two activations - it is computed
over the entries that stay, because that is what the pruned model does; nothing else is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.graph.attention import prunable_attention
from tersor.graph.coupling.couple import Coupling, Run, named_tensors, run_alike
from tersor.graph.coupling.labels import Ledger, support
from tersor.graph.coupling.rules import RULES, fallback
from tersor.graph.coupling.rules.pointwise import _REDUCTIONS
from tersor.graph.coupling.trace import Rule, Trace, observed

_STATISTICS = {f"aten.{name}" for name in _REDUCTIONS.split()}
_NORMS = {"aten.native_layer_norm": 2, "aten._fused_rms_norm": 2}
_PRODUCTS = {"aten.mm": 1, "aten.bmm": 1, "aten.addmm": 2, "aten.baddbmm": 2}
_DISTANCES = {"aten._cdist_forward", "aten._euclidean_dist"}


class Masked(Trace):
    """A trace that knows which classes are gone and computes statistics without them."""

    gone: np.ndarray[Any, np.dtype[np.bool_]]
    numbers: np.ndarray[Any, np.dtype[Any]]
    _cached: tuple[int, Tensor] | None = None

    def kept(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Indices that stay along a dimension; None if all do."""
        for block in self.blocks(tensor):
            if dim in support(block):
                alive = self.alive(block)
                others = sorted(support(block) - {dim})
                vector = alive.amax(others).flatten() if others else alive.flatten()
                if len(vector) == tensor.shape[dim] and not bool(vector.all()):
                    return vector.nonzero().flatten()
        return None

    def alive(self, block: Tensor) -> Tensor:
        """Which entries of a block stay."""
        if bool((block < self.learned).all()):
            return torch.from_numpy(~self.gone[self.numbers[block.numpy()]])
        found = self.ledger.classes()  # labels of new tensors: what they have met so far decides
        dead = np.zeros(int(found.max()) + 1, dtype=bool)
        dead[found[: self.learned][self.gone[self.numbers[: self.learned]]]] = True
        return torch.from_numpy(~dead[found[block.numpy()]])


def masked_outputs(
    model: nn.Module,
    coupling: Coupling,
    removed: Mapping[str, Tensor],
    runs: Iterable[Run],
    rules: Mapping[str, Rule] | None = None,
) -> list[Any]:
    """Outputs of the masked original, one per run.

    Args:
        model: The original, in evaluation mode; it stays as it is.
        coupling: Of the model.
        removed: Family name -> numbers of the removed units.
        runs: Arguments of the model.
        rules: As given to `couple`.
    """
    masked = copy.deepcopy(model)
    tensors = named_tensors(masked)
    classes: list[int] = []
    with torch.no_grad():
        for name, units in removed.items():
            family = coupling[name]
            classes += coupling.classes_of(family, units)
            for place, rows in family.members.items():
                tensor = tensors[place.parameter]
                if isinstance(tensor, nn.Parameter):
                    tensor.index_fill_(place.dim, rows[units].flatten(), 0.0)
    gone = np.zeros(int(coupling.classes.max()) + 1, dtype=bool)
    gone[classes] = True
    outputs = []
    for args, kwargs in runs:
        trace = Masked(Ledger(), {**RULES, **(rules or {})}, fallback)
        trace.gone, trace.numbers = gone, coupling.classes
        trace.adopt(tensors)
        trace.before = without_masked
        with prunable_attention(masked), observed(masked, trace):
            out = run_alike(masked, args, kwargs)
        outputs.append(out)
    return outputs


def without_masked(trace: Trace, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Computes an operator without what is gone; `NotImplemented` if nothing of it concerns the operator."""
    if not isinstance(trace, Masked):
        raise TypeError("only a masked trace knows what is gone")
    if name in _PRODUCTS:
        return _product(trace, _PRODUCTS[name], func, args, kwargs)
    if name in _NORMS:
        return _norm(trace, func, args, kwargs)
    if name in _DISTANCES:
        return _distance(trace, func, args, kwargs)
    if name == "aten._weight_norm_interface":  # a direction that is masked has no length
        return tuple(part.nan_to_num(0.0) for part in func(*args, **kwargs))
    if name == "aten.native_batch_norm":
        return _batch_norm(trace, func, args)
    if name == "aten.native_group_norm":
        return _group_norm(trace, func, args)
    if name in _STATISTICS and isinstance(args[0], Tensor) and args[0].ndim:
        return _reduction(trace, name, func, args, kwargs)
    return NotImplemented


def _product(trace: Masked, position: int, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    left = args[position - 1]
    kept = trace.kept(left, left.ndim - 1)
    if kept is None:
        return NotImplemented
    mask = torch.zeros(left.shape[-1], dtype=left.dtype).index_fill_(0, kept, 1.0)
    return func(*args[: position - 1], left * mask, *args[position:], **kwargs)


def _distance(trace: Masked, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    kept = trace.kept(args[0], args[0].ndim - 1)
    if kept is None:
        return NotImplemented
    return func(*(part.index_select(-1, kept) for part in args[:2]), *args[2:], **kwargs)


def _norm(trace: Masked, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    values, sizes = args[0], args[1]
    kept = trace.kept(values, values.ndim - 1) if len(sizes) == 1 else None
    if kept is None:
        return NotImplemented
    affine = [part.index_select(0, kept) if isinstance(part, Tensor) else part for part in args[2:4]]
    result = list(func(values.index_select(-1, kept), [len(kept)], *affine, *args[4:], **kwargs))
    result[0] = torch.zeros_like(values).index_copy_(-1, kept, result[0].to(values.dtype))
    return tuple(result)


def _batch_norm(trace: Masked, func: Any, args: tuple[Any, ...]) -> Any:
    """New statistics, of an instance or of a weight that is standardised, without what is gone."""
    image, training = args[0], args[5]
    if not training:
        return NotImplemented
    kept = {dim: trace.kept(image, dim) for dim in range(image.ndim) if dim != 1}
    less = image
    for dim, indices in kept.items():
        less = less if indices is None else less.index_select(dim, indices)
    if less is image:
        return NotImplemented
    first, *rest = func(less, *args[1:])
    for dim, indices in kept.items():
        if indices is not None:
            shape = [size if place != dim else image.shape[dim] for place, size in enumerate(first.shape)]
            first = first.new_zeros(shape).index_copy_(dim, indices, first)
    return (first, *rest)


def _group_norm(trace: Masked, func: Any, args: tuple[Any, ...]) -> Any:
    image, weight, bias, batch, channels, pixels, groups, eps = args
    kept = trace.kept(image, 1)
    if kept is None:
        return NotImplemented
    per_group = channels // groups
    left = len(set((kept // per_group).tolist()))
    affine = [part.index_select(0, kept) if part is not None else None for part in (weight, bias)]
    result = list(func(image.index_select(1, kept).contiguous(), *affine, batch, len(kept), pixels, left, eps))
    result[0] = torch.zeros_like(image).index_copy_(1, kept, result[0])
    return tuple(result)


def _reduction(trace: Masked, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    values = args[0]
    place = 2 if name in ("aten.linalg_vector_norm", "aten.norm") else 1
    dims = args[place] if len(args) > place else kwargs.get("dim")
    listed = dims if isinstance(dims, tuple | list) else [dims] if type(dims) is int else range(values.ndim)
    changed = False
    for dim in sorted({int(dim) % values.ndim for dim in listed} or set(range(values.ndim))):
        kept = trace.kept(args[0], dim)
        if kept is not None:
            values, changed = values.index_select(dim, kept), True
    return func(values, *args[1:], **kwargs) if changed else NotImplemented
