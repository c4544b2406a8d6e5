"""The exponential moving average of a module's weights.

``a₁ = w₁`` and ``aₜ = decay · aₜ₋₁ + (1 − decay) · wₜ`` after step ``t``, for parameters and for the buffers that
`state_dict` holds; what is not a real number, such as BatchNorm's count of batches, is the last one. Polyak & Juditsky
1992, https://doi.org/10.1137/0330046.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of the weights that `module` had after each step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of the step just done."""
        now = tensors_of(self.module)
        if not self.weights:
            self.weights = {name: value.clone() for name, value in now.items()}
            return
        real = [name for name, value in now.items() if value.is_floating_point()]
        if real:
            torch._foreach_lerp_([self.weights[name] for name in real], [now[name] for name in real], 1 - self.decay)
        for name in now.keys() - set(real):
            self.weights[name].copy_(now[name])

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes up the average of an interrupted training."""
        now = tensors_of(self.module)
        self.weights = {name: value.to(now[name].device, copy=True) for name, value in weights.items()}

    def install(self) -> None:
        """Gives the average to the module."""
        put(self.module, self.weights)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the module has the average; afterwards its own weights again."""
        own = {name: value.clone() for name, value in tensors_of(self.module).items()}
        self.install()
        try:
            yield
        finally:
            put(self.module, own)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers: the module's own memory by name, without gradients."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def put(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies the weights into the module."""
    for name, value in tensors_of(module).items():
        value.copy_(weights[name])
