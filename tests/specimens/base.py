"""What a specimen is: a tiny model with random weights and two sets of inputs, to be pruned by tests.

Shapes: `B` batch, `C` channels, `H` x `W` pixels, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], "tuple[Any, ...] | dict[str, Any]"]


@dataclass(frozen=True)
class Specimen:
    """A model and the inputs it is called with.

    Attributes:
        name: Unique in its file.
        build: Makes the module; the caller seeds.
        inputs: Variant 0 or 1 -> arguments, the same every time: a tuple is positional, a dict is keywords. Variant 1
            has another batch size and, where the model allows, another image size or sequence length.
        least: Share of the parameters outside embeddings and heads that `amount=0.5` should remove at least.
        export: Whether `torch.onnx.export(dynamo=True)` of the model as built works.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    least: float = 0.4
    export: bool = True

    def model(self, seed: int = 0) -> nn.Module:
        """The module, seeded, without constant parameters, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return varied(self.build()).eval()

    def call(self, model: nn.Module, variant: int = 0) -> Any:
        """What the model answers to its inputs of this variant."""
        given = self.inputs(variant)
        return model(**given) if isinstance(given, dict) else model(*given)


def varied(module: nn.Module) -> nn.Module:
    """Replaces constants by random values, so that a wrong slice of a scale, shift or statistic changes the answer."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for layer in module.modules():
            if isinstance(getattr(layer, "running_mean", None), Tensor):
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2.0)
    return module


def lively(module: nn.Module) -> nn.Module:
    """Redraws convolutions and BatchNorm scales so large that the signal survives many layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that do not depend on the test order."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random integers in `[2, high)`: 0 and 1 are often padding and start."""
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(seed))


def tensors(first: tuple[int, ...], second: tuple[int, ...]) -> Inputs:
    """One positional tensor of random numbers, of these shapes."""
    return lambda variant: (normal(*(first, second)[variant], seed=variant),)


def images(height: int = 32, width: int = 32, channels: int = 3, *, grow: int = 16) -> Inputs:
    """One positional batch of images, `[2, C, H, W]` or `[3, C, H + grow, W]`."""
    return tensors((2, channels, height, width), (3, channels, height + grow, width))


def tokens(vocabulary: int, *, grow: int = 3) -> Inputs:
    """One positional batch of token numbers, `[2, 9]` or `[3, 9 + grow]`."""
    return lambda variant: (integers(vocabulary, 2 + variant, 9 + grow * variant, seed=variant),)
