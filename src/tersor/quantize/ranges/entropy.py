"""Keeps the distribution of the values as it is: least Kullback-Leibler divergence after rounding.

Migacz 2017, "8-bit inference with TensorRT", GTC 2017, as told by Wu et al. 2020, https://arxiv.org/abs/2004.09602.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.probe.histogram import BINS
from tersor.quantize.ranges.base import Points, codes_of, narrowed


def entropy(points: Points, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """``argmin_a Σ P_a log(P_a / Q_a)`` over the ranges ``a · [min x, max x]``, a in [0.04 … 1].

    `P_a` is the histogram with what lies outside the range added to the outermost bins inside. `Q_a` is what is left
    after rounding: the bins inside the range only, each code's share spread evenly over its occupied bins. The bin of
    zero is no higher than its neighbours, since zero is exact under every range. Where there are not fewer codes
    than bins nothing is merged, and the whole range is taken.
    """
    if scheme.qmax - scheme.qmin + 1 >= BINS:
        return points.low, points.high
    centres, counts = _histogram(points)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        codes, _, _ = codes_of(centres, low, high, scheme)
        inside = (centres >= low[..., None]) & (centres <= high[..., None])
        return _divergence(counts, inside, (codes - scheme.qmin).long())

    return narrowed(replace(points, values=centres, counts=counts), cost)


def _histogram(points: Points) -> tuple[Tensor, Tensor]:
    """Centres and counts of equal bins over each region, `[R, BINS]` float64."""
    low, high = points.low.double()[:, None], points.high.double()[:, None]
    peak = torch.maximum(low.abs(), high.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    start = low / peak  # in units of the largest magnitude nothing overflows
    step = ((high / peak - start) / BINS).clamp(min=torch.finfo(torch.float64).tiny)
    index = ((points.values / peak - start) / step).floor().clamp(0, BINS - 1).long()
    counts = torch.zeros(len(low), BINS, dtype=torch.float64, device=low.device)
    counts.scatter_add_(1, index, points.counts.double())
    zero = (-start / step).floor().clamp(0, BINS - 1).long()
    neighbours = torch.maximum(
        counts.gather(1, (zero - 1).clamp(min=0)) * (zero > 0),
        counts.gather(1, (zero + 1).clamp(max=BINS - 1)) * (zero < BINS - 1),
    )
    counts.scatter_(1, zero, torch.minimum(counts.gather(1, zero), neighbours))
    share = (torch.arange(BINS, dtype=torch.float64, device=low.device) + 0.5) / BINS
    return low * (1 - share) + high * share, counts


def _divergence(counts: Tensor, inside: Tensor, codes: Tensor) -> Tensor:
    """From counts `[R, BINS]` and `[A, R, BINS]` of the others to `[A, R]`; infinite if nothing is inside."""
    kept = counts * inside
    occupied = (kept > 0).double()
    first = occupied.argmax(-1, keepdim=True)
    last = BINS - 1 - occupied.flip(-1).argmax(-1, keepdim=True)
    place = torch.arange(BINS, device=counts.device).maximum(first).minimum(last)
    true = torch.zeros_like(kept).scatter_add_(-1, place, counts.expand_as(kept))
    mass = torch.zeros_like(kept).scatter_add_(-1, codes, kept).gather(-1, codes)
    share = torch.zeros_like(kept).scatter_add_(-1, codes, occupied).gather(-1, codes)
    rounded = occupied * mass / share.clamp(min=1)
    true, rounded = true / true.sum(-1, keepdim=True), rounded / rounded.sum(-1, keepdim=True)
    divergence = torch.where(occupied > 0, torch.special.xlogy(true, true / rounded), 0.0).sum(-1)
    return torch.where(occupied.sum(-1) > 0, divergence, torch.inf)
