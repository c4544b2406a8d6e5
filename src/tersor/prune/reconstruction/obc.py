"""Optimal brain compression: removes the weight that costs least, repairs its row, and again, exactly.

Frantar & Alistarh 2022, https://arxiv.org/abs/2208.11580. Removing column `p` of a row costs ``w_p² / [H⁻¹]_pp`` and
is repaired by ``w − w_p / [H⁻¹]_pp · H⁻¹[p]``; then ``H⁻¹`` loses `p` by one step of elimination. We never form the
updated inverses: elimination in the greedy order is a pivoted Cholesky factorisation of ``H⁻¹``, of which one new row
per step is enough. All rows share the one inverse in memory.

Shapes: `O` outputs (rows), `K` columns, `R` rows of a chunk, `T` steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.probe.hessian import DAMPING, checked, damped_inverse
from tersor.prune.reconstruction.removals import removals

AHEAD = 0.2  # how much more than the mean share a row is first tried to lose
CHUNK = 1 << 22  # numbers that the factors of a chunk of rows hold: about what a cache holds


def prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Zeroes weights one by one and repairs the rest of their rows after each.

    With `sparsity`, rows are emptied once to learn what each removal costs, then the cheapest removals over all
    rows are made (the paper's algorithm 2). With `n_m`, each row goes on until `n` of every `m` consecutive weights
    are left. Takes time ``O(O · K³)``: for `K` up to about a thousand.

    Args:
        weight: `[O, K]`.
        gram: `[K, K]`.
        sparsity: Share of zeros, in [0, 1).
        n_m: How many are kept, of how many.
        damping: λ as a share of the mean diagonal of the Gram matrix.

    Returns:
        The new weight, of the weight's type, and its mask, True where kept.

    Raises:
        ConfigError: if shapes, sparsity or pattern are wrong.
    """
    removals(weight.shape[-1], sparsity, n_m)
    work = checked(weight, gram)
    rows, columns = work.shape
    inverse = damped_inverse(gram.to(work.dtype), damping)
    if n_m is not None:
        counts = torch.full((rows,), columns // n_m[1] * (n_m[1] - n_m[0]))
    else:
        assert sparsity is not None  # noqa: S101 - `removals` has seen to it
        counts = _per_row(work, inverse, sparsity)
    pruned, mask, _ = _sweep(work, inverse, counts, n_m)
    return pruned.to(weight.dtype), mask


def _per_row(weight: Tensor, inverse: Tensor, sparsity: float) -> Tensor:
    """How many weights each row loses, `[O]`; first looks a little further than the mean, then to the end if needed."""
    rows, columns = weight.shape
    for depth in (min(columns, round((sparsity + AHEAD) * columns)), columns):
        costs = _sweep(weight, inverse, torch.full((rows,), depth))[2]
        counts = _cheapest(costs, round(sparsity * weight.numel()))
        if depth == columns or int(counts.max()) < depth:
            break
    return counts


def _cheapest(costs: Tensor, removed: int) -> Tensor:
    """How many removals each row makes, `[O]`, from the costs of its steps, `[O, T]`.

    A removal waits for those before it in its row, so each costs at least as much as they do.
    """
    counts = torch.zeros(costs.shape, dtype=torch.int64)
    counts.view(-1)[costs.cummax(1).values.cpu().flatten().argsort(stable=True)[:removed]] = 1
    return counts.sum(1)


def _sweep(
    weight: Tensor, inverse: Tensor, counts: Tensor, n_m: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Eliminates `counts[row]` weights of each row: weights and mask `[O, K]`, costs of the steps `[O, max count]`."""
    order = counts.argsort(stable=True)  # rows of like length together
    steps = int(counts.max()) if len(counts) else 0
    pruned, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    costs = torch.full((len(weight), steps), torch.inf, dtype=weight.dtype, device=weight.device)
    chunk = max(1, CHUNK // max(1, steps * weight.shape[1]))
    for start in range(0, len(order), chunk):
        rows = order[start : start + chunk]
        longest = int(counts[rows].max())
        index = rows.to(weight.device)
        limits = counts[rows].to(weight.device)
        pruned[index], mask[index], costs[index, :longest] = _eliminate(weight[index], inverse, limits, n_m)
    return pruned, mask, costs


def _eliminate(
    weight: Tensor, inverse: Tensor, counts: Tensor, n_m: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    steps = int(counts.max())
    factors = weight.new_zeros(rows, steps, columns)  # rows of the pivoted Cholesky factor of the inverse
    pivots = inverse.diagonal().expand(rows, columns).clone()  # [H⁻¹]_pp as of now
    least = pivots.min() * torch.finfo(weight.dtype).eps
    kept = torch.ones_like(weight, dtype=torch.bool)
    costs = weight.new_full((rows, steps), torch.inf)
    every = torch.arange(rows, device=weight.device)
    for step in range(steps):
        going = (step < counts)[:, None]
        scores = (weight.square() / pivots).masked_fill_(~_allowed(kept, n_m), torch.inf)
        cost, chosen = scores.min(1)
        costs[:, step] = cost
        past = factors[:, :step]
        coefficients = past[every, :, chosen][:, None]  # [R, 1, T]
        row = (inverse[chosen] - torch.bmm(coefficients, past)[:, 0]) * kept  # H⁻¹[p] as of now
        pivot = pivots.gather(1, chosen[:, None])
        change = (weight.gather(1, chosen[:, None]) / pivot) * row
        weight = torch.where(going, weight - change, weight)
        kept[every, chosen] &= ~going[:, 0]
        weight.masked_fill_(~kept, 0)
        factor = row / pivot.sqrt()
        factors[:, step] = factor
        pivots = (pivots - factor.square()).clamp_min_(least)
    return weight, kept, costs


def _allowed(kept: Tensor, n_m: tuple[int, int] | None) -> Tensor:
    """Which weights may still go, `[R, K]`."""
    if n_m is None:
        return kept
    more = kept.reshape(len(kept), -1, n_m[1]).sum(2) > n_m[0]
    return kept & more.repeat_interleave(n_m[1], dim=1)
