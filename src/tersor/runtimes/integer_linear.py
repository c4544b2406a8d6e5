"""A linear layer on int8 codes, for PyTorch's own integer product.

Shapes: `B` rows, `K` inputs, `O` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.runtimes.stored_weights import StoredWeight

FEWEST_INPUTS = 2
LEVELS = 255
MIDDLE = 128  # uint8 codes less 128 are int8 codes; every PyTorch multiplies int8 with int8


class IntegerLinear(nn.Module):
    """``y = s_x s_w ((q_x − z_x) q_wᵀ) + b`` with `s_x`, `z_x` from the smallest and largest input of each call.

    ``s_x = (max(0, max x) − min(0, min x)) / 255``, ``z_x = round(−min(0, min x) / s_x) − 128``: 8 bits per tensor.
    The product is exact, in int32. Jacob et al. 2018, https://arxiv.org/abs/1712.05877.

    Args:
        weight: `[O, K]` with `K` of at least 2, symmetric, one scale per output. PyTorch 2.13 multiplies matrices of a
            single inner index wrongly.
        bias: `[O]`, or None.
        turned: Whether the layer that this stands for keeps its weight as `[K, O]`.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor

    def __init__(self, weight: StoredWeight, bias: nn.Parameter | None, *, turned: bool) -> None:
        super().__init__()
        codes = weight.codes.to(torch.int8)
        self.register_buffer("codes", codes.T)
        self.register_buffer("scale", weight.scale.flatten())
        self.register_buffer("sums", codes.sum(1, dtype=torch.int32))
        self.bias = bias
        self.turned = turned
        # Hooks keep `nn.TransformerEncoderLayer` off its fused float path, which would only read `weight`.
        self.register_forward_pre_hook(_no_change)

    @property
    def weight(self) -> Tensor:
        """In float, for models that look at it."""
        values = self.codes * self.scale
        return values if self.turned else values.T

    def forward(self, values: Tensor) -> Tensor:
        """`[…, K]` -> `[…, O]`."""
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        step = (high - low) / LEVELS
        step = torch.where(step == 0, torch.ones_like(step), step)  # NaN stays
        zero_point = (-low / step).clamp(0, LEVELS).round()
        rows = values.reshape(-1, values.shape[-1])
        codes = (((rows / step).round() + zero_point).clamp(0, LEVELS) - MIDDLE).to(torch.int8)
        product = torch._int_mm(codes, self.codes) - (zero_point - MIDDLE).to(torch.int32) * self.sums
        result = product * (step * self.scale)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*values.shape[:-1], -1)


def _no_change(module: nn.Module, args: tuple[object, ...]) -> None:
    """A hook that does nothing."""


def with_integer_layers(module: nn.Module, weights: Mapping[str, StoredWeight]) -> nn.Module:
    """The module with its plain linear layers replaced, in place, where their weight is one of `weights`.

    Layers of other classes use their weights in their own way and stay: attention, recurrent layers, embeddings.
    """
    first = {id(parameter): path for path, parameter in module.named_parameters()}
    made: dict[int, IntegerLinear] = {}
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        turned = type(layer).__name__ == "Conv1D"  # of transformers
        if not turned and type(layer) is not nn.Linear:
            continue
        stored = weights.get(first.get(id(layer.weight), ""))
        if stored is None or stored.shape[0 if turned else 1] < FEWEST_INPUTS:
            continue
        if id(layer) not in made:
            bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
            made[id(layer)] = IntegerLinear(stored.transposed() if turned else stored, bias, turned=turned)
        if not path:
            return made[id(layer)]
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, made[id(layer)])
    return module
