"""Re-estimates BatchNorm statistics after a change of the weights before them.

Pruned networks answer with statistics of channels that have changed; averaging them afresh over a few batches
recovers much of the accuracy without training. Li et al. 2020 (EagleEye), https://arxiv.org/abs/2007.02491.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, as_batch
from tersor.errors import DataError


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Sets every BatchNorm's running statistics to their averages over `batches`, in place; weights stay.

    A last batch of one example is left out, as in training. Layers that no batch reaches keep their statistics.

    Returns:
        Number of layers with new statistics; if the model has no BatchNorm, no batch is read.

    Raises:
        DataError: naming layer and batch, if a channel is a single value there, which has no variance.
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    before = {path: (norm.momentum, _buffers(norm)) for path, norm in norms.items()}
    seen: set[str] = set()
    handles = [norm.register_forward_pre_hook(_Check(path, seen), with_kwargs=True) for path, norm in norms.items()]
    done = False
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        with torch.no_grad():
            for batch in _without_lone_end(batches):
                batch.call(model)
        done = True
    finally:
        for handle in handles:
            handle.remove()
        for path, norm in norms.items():
            norm.momentum, old = before[path]
            if not done or path not in seen:
                for name, value in norm.named_buffers():
                    value.copy_(old[name])
        for module, mode in modes:
            module.training = mode
    return len(seen)


def _buffers(norm: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers()}


def _without_lone_end(batches: Iterable[Any]) -> Iterator[Batch]:
    """All batches, except a last one of one example behind others."""
    held: Batch | None = None
    for index, item in enumerate(batches):
        if held is not None:
            yield held
        held = as_batch(item, f"batch {index}")
    if held is not None and (len(held) > 1 or index == 0):
        yield held


class _Check:
    """Before a layer runs: every channel must have several values."""

    def __init__(self, path: str, seen: set[str]) -> None:
        self.path, self.seen = path, seen

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel() <= values.shape[1]:
            raise DataError(
                f"BatchNorm {self.path!r} needs several values per channel to take their variance, one batch gives it "
                f"{tuple(values.shape)}; give batches of at least two examples"
            )
        self.seen.add(self.path)
