"""PyTorch's view of kernels that choose the scale of an activation while they run."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Flattened

LEVELS = 255


def rounded_at_run_time(values: Tensor) -> Tensor:
    """ONNX's DynamicQuantizeLinear and back: uint8 codes over the values' own range, zero included.

    ``s = (max(0, max x) − min(0, min x)) / 255``, ``z = round(−min(0, min x) / s)``, per tensor of any shape.
    """
    if not values.is_floating_point() or not values.numel():
        return values
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).clamp(0, LEVELS).round()
    codes = ((values / scale).round() + zero_point).clamp(0, LEVELS)
    return (codes - zero_point) * scale


class RoundInputs:
    """A hook that rounds the first `count` tensors that a module is given."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """New arguments; one tensor that is passed several times stays one."""
        known: dict[int, Any] = {}

        def rounded(value: Any) -> Any:
            if not isinstance(value, Tensor):  # e.g. packed sequences
                return value
            return known.setdefault(id(value), rounded_at_run_time(value))

        names = [*kwargs][: max(0, self.count - len(args))]
        return (
            (*(rounded(value) for value in args[: self.count]), *args[self.count :]),
            {name: rounded(value) if name in names else value for name, value in kwargs.items()},
        )


def simulate(
    module: nn.Module, paths: Collection[str], keywords: tuple[str, ...], output: str | int | None
) -> nn.Module:
    """A copy that takes its inputs by position and rounds what flows into the modules at `paths`."""
    twin = copy.deepcopy(module).eval().requires_grad_(False)
    for path in sorted(paths):
        layer = twin.get_submodule(path)
        count = 3 if isinstance(layer, nn.MultiheadAttention) else 1
        layer.register_forward_pre_hook(RoundInputs(count), with_kwargs=True)
    return Flattened(twin, keywords, output).eval()
