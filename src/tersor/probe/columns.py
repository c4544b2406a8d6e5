"""What the rows of a layer's weight matrix are multiplied with.

Shapes: `N` rows: examples times positions, `G` groups of a convolution, `K` columns of the weight matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SAMPLE = 4096  # rows that are taken per call of a layer; positions of one image are much alike


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input, per spatial dimension.

    Attributes:
        kernel: Its extent.
        stride: Step between positions.
        dilation: Step inside the kernel.
        padding: As `functional.pad` takes it: two numbers per dimension, the last dimension first.
        mode: What is padded, as in `functional.pad`.
        groups: Of channels.
    """

    kernel: tuple[int, ...]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]
    mode: str = "constant"
    groups: int = 1


def columns(values: Tensor, window: Window | None, generator: torch.Generator) -> Tensor:
    """Rows `[N, G, K]`, float32 or better; `window` is None for a linear layer.

    Of more than `SAMPLE` positions a random sample is taken, before any convolution window is copied.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if window is None:
        rows = values.reshape(-1, 1, values.shape[-1])
        return rows[_sample(len(rows), generator)]
    sizes = len(window.kernel)
    if values.ndim == sizes + 1:
        values = values[None]
    values = functional.pad(values, tuple(window.padding), mode=window.mode)
    windows = values.movedim(1, -1)  # [B, …, C]
    for dim, (kernel, stride, dilation) in enumerate(
        zip(window.kernel, window.stride, window.dilation, strict=True), start=1
    ):
        windows = windows.unfold(dim, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    positions = windows.shape[: sizes + 1]  # [B, …, C, kernel …]: a view, nothing copied yet
    chosen = torch.unravel_index(_sample(math.prod(positions), generator), positions)
    return windows[chosen].reshape(len(chosen[0]), window.groups, -1)


def _sample(count: int, generator: torch.Generator) -> Tensor:
    if count <= SAMPLE:
        return torch.arange(count)
    return torch.randint(count, (SAMPLE,), generator=generator)
