"""One small model for every way in which code depends on sizes: computed, compared, remembered, or met in training.

Shapes: sequences `[B, T, 24]`, answers `[B, T, CLASSES]` unless stated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images, normal, tensors, tokens
from specimens.constructs_joins import CLASSES, Constructed, conv, pooled

SEQUENCES = tensors((2, 5, 24), (3, 8, 24))


class FoldedHeads(nn.Module):
    """Heads folded into the batch, widths asserted, as in BART; the width inside is that of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads, self.size = width, heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        if width != self.width:
            raise ValueError(f"expected a width of {self.width}, got {width}")
        shape = (batch * self.heads, -1, self.size)
        q, k, v = (
            layer(x).view(batch, -1, self.heads, self.size).transpose(1, 2).reshape(*shape)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(self.size)).softmax(-1)
        if weights.size() != (batch * self.heads, steps, steps):
            raise ValueError(f"expected weights of {batch * self.heads} heads, got {weights.size()}")
        x = (weights @ v).view(batch, self.heads, steps, self.size).transpose(1, 2)
        return self.out(x.reshape(batch, steps, self.width))


def folded_heads() -> nn.Module:
    """Two layers."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        return m.head(x + m.second(x + m.first(x)))

    return Constructed(
        run, inner=nn.Linear(24, 32), first=FoldedHeads(32, 4), second=FoldedHeads(32, 4), head=nn.Linear(32, CLASSES)
    )


class LatentHeads(nn.Module):
    """Keys of a latent part of every head, and one rotary part for all, as in DeepSeek."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.down = nn.Linear(width, heads * 2 * size), nn.Linear(width, 12 + size)
        self.up, self.out = nn.Linear(12, heads * 2 * size), nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q = self.q(x).view(batch, steps, -1, 2 * self.size).transpose(1, 2)
        latent, shared = torch.split(self.down(x), [self.down.out_features - self.size, self.size], dim=-1)
        parts = self.up(latent).view(batch, steps, -1, 2 * self.size).transpose(1, 2)
        own, v = torch.split(parts, [self.size, self.size], dim=-1)
        k = torch.cat([own, shared[:, None].expand(*own.shape[:-1], -1)], dim=-1)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(batch, steps, -1))


def latent_heads() -> nn.Module:
    """One layer."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        return m.head(x + m.attention(x))

    return Constructed(run, inner=nn.Linear(24, 32), attention=LatentHeads(32, 4, 8), head=nn.Linear(32, CLASSES))


def three_dimensions() -> nn.Module:
    """Weights `[width, heads, size]` and einsums, as in XLNet: also where both dimensions are summed over."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        q, k, v = (torch.einsum("bth,hnd->btnd", x, weight) for weight in (m.q, m.k, m.v))
        weights = (torch.einsum("bind,bjnd->bnij", q, k) / math.sqrt(8)).softmax(-1)
        return m.head(x + torch.einsum("bind,hnd->bih", torch.einsum("bnij,bjnd->bind", weights, v), m.o))

    weights = {name: nn.Parameter(0.2 * normal(32, 4, 8, seed=seed)) for seed, name in enumerate("qkvo")}
    return Constructed(run, inner=nn.Linear(24, 32), head=nn.Linear(32, CLASSES), **weights)


def head_norms() -> nn.Module:
    """GroupNorm with a group for every head, as in RetNet."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        batch, steps, _ = x.shape
        q, k, v = (layer(x).view(batch, steps, -1, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = (q @ k.transpose(-1, -2) @ v).transpose(1, 2).reshape(batch * steps, -1)
        return m.head(x + m.out(m.norm(y).view(batch, steps, -1)))

    q, k, v = (nn.Linear(32, 32) for _ in range(3))
    return Constructed(
        run, inner=nn.Linear(24, 32), q=q, k=k, v=v, norm=nn.GroupNorm(4, 32), out=nn.Linear(32, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def grouped_heads() -> nn.Module:
    """A grouped convolution over features of which whole heads go, as in WavLM: whole groups go as well."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        x = x + m.positions(x.transpose(1, 2)).transpose(1, 2)
        return m.head(x + m.attention(x))

    positions = nn.Conv1d(32, 32, 9, padding=4, groups=4)  # the padding is no number of groups
    return Constructed(
        run, inner=nn.Linear(24, 32), positions=positions, attention=FoldedHeads(32, 4), head=nn.Linear(32, CLASSES)
    )


def mixed_kernels() -> nn.Module:
    """A kernel for every image, mixed from 4, as a convolution with a group for every image (CondConv)."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        batch, channels, height, width = x.shape
        kernels = m.choose(pooled(x)).softmax(-1) @ m.kernels.flatten(1)
        kernels = kernels.view(batch * m.outputs, channels, 3, 3)
        x = functional.conv2d(x.reshape(1, -1, height, width), kernels, padding=1, groups=batch)
        return m.head(pooled(m.last(x.view(batch, m.outputs, height, width).relu()).relu()))

    return Constructed(
        run, stem=conv(3, 8), choose=nn.Linear(8, 4), kernels=nn.Parameter(0.1 * normal(4, 32, 8, 3, 3)), outputs=32,
        last=conv(32, 48), head=nn.Linear(48, CLASSES),
    )  # fmt: skip


def projected_states() -> nn.Module:
    """LSTM whose states are projected: three sizes."""

    def run(m: Constructed, words: Tensor) -> Tensor:
        return m.head(m.lstm(m.embedding(words))[0])

    lstm = nn.LSTM(24, 48, num_layers=2, proj_size=20, batch_first=True)
    return Constructed(run, embedding=nn.Embedding(40, 24), lstm=lstm, head=nn.Linear(20, CLASSES))


def masked_in_training() -> nn.Module:
    """A vector that takes the place of some steps, in training only: it goes with the stream all the same."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        if m.training:
            x[torch.rand(x.shape[:2]) < 0.5] = m.mask
        return m.head(x + m.down(m.up(x).relu()))

    return Constructed(
        run, inner=nn.Linear(24, 32), mask=nn.Parameter(normal(32)), up=nn.Linear(32, 64), down=nn.Linear(64, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


class Positions(nn.Module):
    """Sines that are computed anew when the length changes, and kept, with the length."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.kept = 0, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.length:
            self.length = x.shape[1]
            self.kept = torch.arange(self.length, dtype=x.dtype).sin()[:, None]
        return x + self.kept


def remembered_length() -> nn.Module:
    """A cache, and the length that it is for."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(m.outer(m.positions(m.inner(x))).relu())

    return Constructed(
        run, inner=nn.Linear(24, 48), positions=Positions(), outer=nn.Linear(48, 32), head=nn.Linear(32, CLASSES)
    )


def noisy() -> nn.Module:
    """A sample in `forward` (VAE): the same noise for every check."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        mean, spread = m.encode(x).chunk(2, -1)
        mean = mean + spread.exp() * torch.randn(mean.shape[:-1], device=x.device)[..., None]
        return m.head(m.decode(mean).relu())

    return Constructed(run, encode=nn.Linear(24, 48), decode=nn.Linear(24, 64), head=nn.Linear(64, CLASSES))


SIZES = [
    Specimen("folded_heads", folded_heads, SEQUENCES),
    Specimen("latent_heads", latent_heads, SEQUENCES),
    Specimen("three_dimensions", three_dimensions, SEQUENCES),
    Specimen("head_norms", head_norms, SEQUENCES),
    Specimen("grouped_heads", grouped_heads, SEQUENCES),
    Specimen("mixed_kernels", mixed_kernels, images(16, 16)),
    # ONNX has no projected states.
    Specimen("projected_states", projected_states, tokens(40), export=False),
    Specimen("masked_in_training", masked_in_training, SEQUENCES),
    Specimen("remembered_length", remembered_length, SEQUENCES),
    # The noise of another runtime is another.
    Specimen("noisy", noisy, SEQUENCES, export=False),
]
