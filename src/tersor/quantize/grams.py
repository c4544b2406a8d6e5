"""Gram matrices of the inputs of one module's weight at a time, from running the model up to there.

Shapes: `N` rows: examples times positions, `K` inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import NonFiniteError
from tersor.probe.recurrent import recurrent_rows
from tersor.quantize.modules import ModuleWeight


class _Reached(Exception):
    """The layer has been called as often as it will be."""


def call_order(model: nn.Module, chosen: Sequence[ModuleWeight], batch: Batch) -> dict[str, int]:
    """How often each module that owns a chosen weight is called, in the order of first calls."""
    counts: dict[str, int] = {}

    def counter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            counts[path] = counts.get(path, 0) + 1

        return hook

    modules = {weight.module_path: weight.module for weight in chosen}
    handles = [module.register_forward_pre_hook(counter(path)) for path, module in modules.items()]
    try:
        with torch.no_grad():
            batch.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def gram_of(model: nn.Module, weight: ModuleWeight, batches: Sequence[Batch], calls: int) -> Tensor | None:
    """``X Xᵀ / N`` of what the rows of a weight are multiplied with, `[K, K]`; None if no batch shows it.

    Each pass ends once the layer has been called, so only the layers before it run.

    Args:
        model: In evaluation mode, with the weights that it has now.
        weight: Whose inputs.
        batches: What to run on.
        calls: How often the module is called per pass.

    Raises:
        NonFiniteError: naming the batch in which NaN or Inf reached the layer.
    """
    total: Tensor | None = None
    count = 0
    for number, batch in enumerate(batches):
        seen: list[Tensor] = []
        batch.check_finite(f"calibration batch {number}")
        handle = weight.module.register_forward_pre_hook(_watch(weight, seen, calls), with_kwargs=True)
        try:
            with torch.no_grad():
                batch.call(model)
        except _Reached:
            pass
        finally:
            handle.remove()
        for rows in seen:
            gram = rows.T @ rows
            if not bool(torch.isfinite(gram.diagonal()).all()):
                raise NonFiniteError(
                    f"calibration batch {number}: NaN or Inf flows into layer {weight.module_path!r}; check the data "
                    "and the model's weights"
                )
            total = gram if total is None else total + gram
            count += len(rows)
    return None if total is None or not count else total / count


def _watch(weight: ModuleWeight, seen: list[Tensor], calls: int) -> Callable[..., None]:
    done = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        values = [*args, *kwargs.values()]
        if values and isinstance(values[0], Tensor):
            seen.append(_rows(weight, module, values))
        if done >= calls:
            raise _Reached

    return hook


def _rows(weight: ModuleWeight, module: nn.Module, values: list[Any]) -> Tensor:
    if isinstance(module, nn.RNNBase):
        state = values[1] if len(values) > 1 else None
        return recurrent_rows(module, weight.name, values[0], state)
    inputs: Tensor = values[0].detach()
    return inputs.reshape(-1, inputs.shape[-1])


def can_be_watched(weight: ModuleWeight) -> bool:
    """Whether a call of the module shows what its weight is multiplied with.

    Attention computes its last projection without calling it, and its packed one may meet three different inputs.
    """
    packed = isinstance(weight.module, nn.MultiheadAttention)
    return weight.kind in ("linear", "recurrent") and not packed
