"""Multiply-accumulates of one forward pass, counted by PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_accumulates(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Products in matrix multiplications, convolutions and attention of one call, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch._C._get_mkldnn_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not look into fused kernels
        if recurrent:
            torch._C._set_mkldnn_enabled(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
    return int(counter.get_total_flops()) // 2
