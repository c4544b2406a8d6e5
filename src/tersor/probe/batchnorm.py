"""Re-estimates BatchNorm statistics after a change of the weights before them.

Pruned networks answer with statistics of channels that have changed; averaging them afresh over a few batches
recovers much of the accuracy without training. Li et al. 2020 (EagleEye), https://arxiv.org/abs/2007.02491.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tersor.core.batch import as_batch


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Sets every BatchNorm's running statistics to their averages over `batches`, in place; weights stay.

    Returns:
        Number of layers with new statistics; without any, no batch is read.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    before = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        with torch.no_grad():
            for index, item in enumerate(batches):
                as_batch(item, f"batch {index}").call(model)
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(norms)
