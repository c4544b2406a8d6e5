"""Which experts of a mixture do least.

Shapes: `E` experts, `T` tokens, `k` experts that each token is sent to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import NonFiniteError
from tersor.graph.attention import prunable_attention
from tersor.graph.coupling import Run
from tersor.graph.coupling.couple import named_tensors, run_alike
from tersor.graph.coupling.trace import observed
from tersor.graph.expert_surgery import outputs_without
from tersor.graph.experts import Mixture, Mixtures
from tersor.graph.routing import routing
from tersor.prune.choosing import Loss

Scores = Mapping[str, tuple[float, ...]]


def usage(model: nn.Module, mixtures: Mixtures, runs: Sequence[Run]) -> Scores:
    """Mixture -> of each expert the mean over tokens of `p_te`, where token `t` is sent to expert `e`, else 0.

    `p` is what the router chooses from, or its softmax over the experts if it does not sum to one. Padding counts
    like any token. Muzio et al. 2024 (SEER-MoE), https://arxiv.org/abs/2404.05089.

    Raises:
        NonFiniteError: if a router's scores hold NaN.
    """
    noted: list[tuple[Tensor, Tensor, int]] = []

    def note(labels: Tensor, scores: Tensor, numbers: Tensor) -> None:
        values = scores.double()
        sums = bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 1e-3).all())
        weights = torch.zeros_like(values).scatter(
            1, numbers, (values if sums else values.softmax(-1)).gather(1, numbers)
        )
        noted.append((labels, weights.sum(0), len(values)))

    trace = routing()
    trace.adopt(named_tensors(model))
    trace.chosen = note
    for run in runs:
        with prunable_attention(model), observed(model, trace):
            run_alike(model, *run)
    classes = trace.ledger.classes()
    sums, tokens = np.zeros(int(classes.max()) + 1), np.zeros(int(classes.max()) + 1)
    for labels, weights, count in noted:
        numbers = classes[labels.numpy()]
        np.add.at(sums, numbers, weights.numpy())
        np.add.at(tokens, numbers, count)
    found = {mixture.name: classes[list(mixture.labels)] for mixture in mixtures.found}
    return _finite({name: tuple((sums[c] / np.maximum(tokens[c], 1)).tolist()) for name, c in found.items()})


def loss_increase(
    model: nn.Module, mixtures: Mixtures, wanted: Sequence[Mixture], batches: Sequence[Batch], loss: Loss
) -> Scores:
    """Mixture -> of each expert the mean loss if it alone can never be chosen, less the mean loss of the model.

    Compare Lu et al. 2024, https://arxiv.org/abs/2402.14800, who compare the outputs of all subsets.

    Raises:
        NonFiniteError: if a loss is NaN or Inf.
    """

    def mean(removed: Mapping[str, Sequence[int]]) -> float:
        outputs = outputs_without(model, mixtures, removed, [(batch.args, batch.kwargs) for batch in batches])
        losses = [float(loss(out, b.labels)) * len(b) for out, b in zip(outputs, batches, strict=True)]
        return sum(losses) / max(1, sum(len(batch) for batch in batches))

    whole = mean({})
    return _finite(
        {item.name: tuple(mean({item.name: [expert]}) - whole for expert in range(item.size)) for item in wanted}
    )


def by_chance(mixtures: Sequence[Mixture], seed: int) -> Scores:
    """Mixture -> random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {mixture.name: tuple(torch.rand(mixture.size, generator=generator).tolist()) for mixture in mixtures}


def _finite(scores: Scores) -> Scores:
    bad = [name for name, values in scores.items() if not all(math.isfinite(value) for value in values)]
    if bad:
        raise NonFiniteError(
            f"the scores of the experts of {bad} are NaN or Inf; check the model's weights and the data"
        )
    return scores
