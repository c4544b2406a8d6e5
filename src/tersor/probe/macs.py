"""Multiply-accumulates of one forward pass, by PyTorch's own formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tersor.graph.coupling.couple import run_model


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up `flop_registry`; `FlopCounterMode` itself hooks modules and fails on some outputs without gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=out)
        return out


def multiply_accumulates(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Products in matrix multiplications, convolutions and attention of one call, in evaluation mode.

    Raises:
        ModelError: if the model does not run on these arguments.
    """
    modes = [(module, module.training) for module in model.modules()]
    fused = torch._C._get_mkldnn_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the formulas do not know fused kernels
        if recurrent:
            torch._C._set_mkldnn_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
            run_model(model, args, dict(kwargs))
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
    return int(counter.operations) // 2
