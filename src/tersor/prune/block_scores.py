"""How much a model would miss each of its blocks.

Shapes: `B` batch, `T` tokens, `C` channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.surgery import SkippedBlock
from tersor.errors import NonFiniteError
from tersor.graph.blocks import argument, bypassed
from tersor.graph.coupling import Run
from tersor.graph.coupling.couple import run_model
from tersor.prune.choosing import Loss


def dissimilarity(model: nn.Module, blocks: Sequence[SkippedBlock], runs: Sequence[Run]) -> dict[str, float]:
    """Block -> `1 - mean cos(input, output)`: over tokens `[B, C]` and `[B, T, C]`, over whole examples otherwise.

    Men et al. 2024, https://arxiv.org/abs/2403.03853. Padding counts like any token.

    Raises:
        NonFiniteError: if a block's input or output holds NaN or Inf.
    """
    sums = {block.path: [0.0, 0.0] for block in blocks}
    handles = []
    for block in blocks:
        note = _Likeness(block, sums[block.path])
        module = model.get_submodule(block.path)
        handles.append(module.register_forward_pre_hook(note.before, with_kwargs=True))
        handles.append(module.register_forward_hook(note.after, with_kwargs=True))
    try:
        with torch.no_grad():
            for args, kwargs in runs:
                run_model(model, *copy.deepcopy((args, kwargs)))
    finally:
        for handle in handles:
            handle.remove()
    scores = {path: 1 - total / max(1.0, count) for path, (total, count) in sums.items()}
    return _finite(scores)


class _Likeness:
    def __init__(self, block: SkippedBlock, sums: list[float]) -> None:
        self.block, self.sums = block, sums
        self.inputs: list[Tensor] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(argument(self.block.sources[0], args, kwargs).clone())

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        old, new = self.inputs.pop().double(), (output if isinstance(output, Tensor) else output[0]).double()
        if old.ndim > 3:
            old, new = old.flatten(1), new.flatten(1)
        cosines = functional.cosine_similarity(old, new, dim=-1)
        self.sums[0] += float(cosines.sum())
        self.sums[1] += cosines.numel()


def loss_increase(
    model: nn.Module, blocks: Sequence[SkippedBlock], batches: Sequence[Batch], loss: Loss
) -> dict[str, float]:
    """Block -> mean loss with this block alone bypassed, less the mean loss of the model.

    Raises:
        NonFiniteError: if a loss is NaN or Inf.
    """

    def mean(skipped: Sequence[SkippedBlock]) -> float:
        total, examples = 0.0, 0
        with bypassed(model, skipped), torch.no_grad():
            for batch in batches:
                total += float(loss(batch.call(model), batch.labels)) * len(batch)
                examples += len(batch)
        return total / max(1, examples)

    whole = mean([])
    return _finite({block.path: mean([block]) - whole for block in blocks})


def _finite(scores: dict[str, float]) -> dict[str, float]:
    bad = [path for path, score in scores.items() if score != score or score in (float("inf"), float("-inf"))]
    if bad:
        raise NonFiniteError(f"the scores of blocks {bad} are NaN or Inf; check the model's weights and the data")
    return scores
