"""Which weights go: scores, patterns and allocation brought together; layer-wise reconstruction where asked.

Shapes: `O` outputs, `K` columns, `G` groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersor.core.candidate import apply_masks
from tersor.errors import NonFiniteError, UnsupportedError
from tersor.probe import Evidence
from tersor.prune import allocation
from tersor.prune.criteria.base import has_needs
from tersor.prune.patterns import as_matrix, columns_of, from_matrix, per_output
from tersor.prune.reconstruction import obc, sparsegpt
from tersor.prune.sparsity import Sparsity, criterion_of, measure


@dataclass(frozen=True)
class Selection:
    """What was decided; nothing is changed yet.

    Attributes:
        masks: Parameter path -> boolean keep-mask of its shape.
        repaired: Parameter path -> new weight, where reconstruction was asked for.
        skipped: Parameter paths that stay dense, with the reason.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    repaired: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def select(
    model: nn.Module,
    settings: Sparsity,
    *,
    evidence: Mapping[str, Evidence] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Selection:
    """Decides which entries of every parameter with at least two dimensions go; does not change `model`.

    Args:
        model: The model.
        settings: How much, in which pattern, chosen how.
        evidence: What `measure` found; None where nothing needs to be measured.
        masks: Entries that an earlier round removed; they stay removed and count.

    Raises:
        ConfigError: if something must be measured first.
        UnsupportedError: if there is nothing to prune.
    """
    known = measure(model, settings) if evidence is None else evidence
    weights = {path: weight.detach() for path, weight in model.named_parameters() if weight.ndim >= 2}
    if not weights:
        raise UnsupportedError(
            f"{type(model).__name__} has no parameter with two or more dimensions: there is nothing to prune"
        )
    result = Selection()
    scores: dict[str, Tensor] = {}
    for path, weight in weights.items():
        about = known.get(path)
        reason = _refusal(weight, about, settings)
        if about is None or reason is not None:
            result.skipped.append((path, reason or "it is not a floating-point weight"))
            if masks and path in masks:
                result.masks[path] = masks[path]
            continue
        scores[path] = _scores(path, weight, about, settings, (masks or {}).get(path))
    if not scores:
        why = "; ".join(f"{path}: {reason}" for path, reason in result.skipped)
        raise UnsupportedError(f"{settings.pattern} pruning finds no weight in {type(model).__name__} ({why})")
    shares = _shares(scores, {path: tuple(weights[path].shape) for path in scores}, settings)
    pattern = settings.pattern_
    for path, values in scores.items():
        weight, dim = weights[path], known[path].output_dim
        if settings.reconstruct is None:
            chosen = per_output if settings.allocation == "output" else pattern.keep
            keep = from_matrix(chosen(values, shares[path]), weight, dim)
        else:
            result.repaired[path], keep = _repair(weight, known[path], shares[path], settings)
        if masks and path in masks:
            keep = keep & masks[path]
        result.masks[path] = keep
        if path in result.repaired:
            result.repaired[path] = result.repaired[path] * keep
    return result


def install(model: nn.Module, selection: Selection) -> None:
    """Writes repaired weights into `model` and zeroes the masked entries; changes `model`."""
    with torch.no_grad():
        for path, weight in selection.repaired.items():
            model.get_parameter(path).copy_(weight)
    apply_masks(model, selection.masks)


def _refusal(weight: Tensor, about: Evidence | None, settings: Sparsity) -> str | None:
    """Why the weight stays dense; None if it may be pruned."""
    if about is None:
        return "nothing is known about it"
    criterion = criterion_of(settings.criterion)
    if not has_needs(criterion, about) or (settings.reconstruct is not None and about.gram is None):
        return (
            f"no {', '.join(sorted(settings.needs))} was measured: no layer that tersor can watch used it on the data"
        )
    if settings.reconstruct is not None and about.role != "weight":
        return f"{settings.reconstruct} repairs weights of linear and convolution layers only"
    return settings.pattern_.refusal(weight.movedim(about.output_dim, 0).shape[1])


def _scores(path: str, weight: Tensor, about: Evidence, settings: Sparsity, earlier: Tensor | None) -> Tensor:
    entries = criterion_of(settings.criterion).entries
    assert entries is not None  # noqa: S101 - `criterion_of` has seen to it
    scores = entries(weight, about).detach().float()
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(
            f"criterion {settings.criterion!r} scores {path!r} with NaN or Inf; check the model's weights and the data"
        )
    if earlier is not None:
        scores = scores.masked_fill(~earlier.to(scores.device), -torch.inf)
    return as_matrix(scores, about.output_dim)


def _shares(
    scores: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], settings: Sparsity
) -> dict[str, float]:
    """Share of the units of every weight that goes."""
    pattern, floor = settings.pattern_, settings.floor
    if pattern.share is not None:
        return dict.fromkeys(scores, pattern.share)
    units = {path: pattern.units(values) for path, values in scores.items()}
    sizes = {path: values.numel() for path, values in units.items()}
    if settings.threshold is not None:
        return allocation.below(units, settings.threshold, floor)
    if settings.allocation == "global":
        return allocation.global_ranking(units, settings.share, floor)
    if settings.allocation == "uniform":
        return allocation.uniform(sizes, settings.share, floor)
    if settings.allocation == "output":
        return allocation.uniform({path: values.shape[1] for path, values in scores.items()}, settings.share, floor)
    if settings.allocation == "erk":
        return allocation.erk(shapes, settings.share, floor)
    return allocation.per_layer(sizes, settings.allocation, default=settings.amount or 0.0, floor=floor)


def _repair(weight: Tensor, about: Evidence, share: float, settings: Sparsity) -> tuple[Tensor, Tensor]:
    """The reconstructed weight and its mask, of the weight's shape; groups of a convolution one by one."""
    prune = {"obc": obc.prune, "sparsegpt": sparsegpt.prune}[str(settings.reconstruct)]
    assert about.gram is not None  # noqa: S101 - `_refusal` has seen to it
    order = columns_of(weight, about.output_dim).to(about.gram.device)
    grams = about.gram if about.gram.ndim == 3 else about.gram[None]
    matrix = as_matrix(weight, about.output_dim)
    parts = []
    for rows, gram in zip(matrix.chunk(len(grams)), grams, strict=True):
        ordered = gram[order][:, order]
        n_m = settings.pattern_.n_m
        parts.append(prune(rows, ordered, n_m=n_m) if n_m is not None else prune(rows, ordered, sparsity=share))
    new = torch.cat([values for values, _ in parts])
    keep = torch.cat([mask for _, mask in parts])
    return from_matrix(new, weight, about.output_dim).to(weight.dtype), from_matrix(keep, weight, about.output_dim)
