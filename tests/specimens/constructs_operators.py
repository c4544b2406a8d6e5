"""One small model for every operator that couples entries in a way of its own.

Shapes: images `[B, 3, H, W]`, sequences `[B, T, 24]`, answers `[B, CLASSES]` unless stated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from specimens.base import Specimen, images, integers, normal, tensors
from specimens.constructs_joins import CLASSES, Constructed, conv, pooled

SEQUENCES = tensors((2, 5, 24), (3, 8, 24))


def weight_norms() -> nn.Module:
    """Normed layers in a row: the length of a filter is that of the inputs that stay."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(pooled(m.third(m.second(m.first(x).relu()).relu()).relu()))

    return Constructed(
        run, first=weight_norm(conv(3, 24)), second=weight_norm(conv(24, 32)), third=weight_norm(conv(32, 32), dim=2),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def spectral_norms() -> nn.Module:
    """Weights divided by their largest singular value, from two buffers that go with rows and flattened columns."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x).relu()).relu().flatten(1))

    return Constructed(
        run, first=spectral_norm(conv(3, 16)), second=spectral_norm(nn.Conv2d(16, 24, 4, 4)),
        head=spectral_norm(nn.Linear(24 * 16, CLASSES)),
    )  # fmt: skip


class Symmetric(nn.Module):
    """The upper triangle, mirrored."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def triangles() -> nn.Module:
    """A symmetric weight: rows and columns keep their order if the same of both go."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(m.second(m.first(x).tanh()).tanh())

    second = nn.Linear(48, 48)
    parametrize.register_parametrization(second, "weight", Symmetric())
    return Constructed(run, first=nn.Linear(24, 48), second=second, head=nn.Linear(48, CLASSES))


def bilinear() -> nn.Module:
    """`nn.Bilinear` between two layers, and distances to learned centres."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.joined(m.left(x).relu(), m.right(x).relu()).relu()
        return m.head(torch.cdist(x, m.centres).neg().exp())

    return Constructed(
        run, left=nn.Linear(24, 16), right=nn.Linear(24, 20), joined=nn.Bilinear(16, 20, 24),
        centres=nn.Parameter(normal(40, 24)), head=nn.Linear(40, CLASSES),
    )  # fmt: skip


def bags() -> nn.Module:
    """`nn.EmbeddingBag`: rows by data, columns go."""

    def run(m: Constructed, words: Tensor) -> Tensor:
        return m.head(m.hidden(m.bag(words)).relu())

    return Constructed(run, bag=nn.EmbeddingBag(40, 48), hidden=nn.Linear(48, 64), head=nn.Linear(64, CLASSES))


def scattered() -> nn.Module:
    """Messages along the edges of a graph, the largest of which stays; answers `[N, CLASSES]`."""

    def run(m: Constructed, nodes: Tensor, edges: Tensor) -> Tensor:
        x = m.first(nodes).relu()
        sent = x[edges[0]]
        place = edges[1].unsqueeze(-1).expand_as(sent)
        x = torch.zeros_like(x).scatter_reduce(0, place, sent, "amax", include_self=False)
        return m.head(m.second(x).relu())

    return Constructed(run, first=nn.Linear(24, 48), second=nn.Linear(48, 64), head=nn.Linear(64, CLASSES))


def frequencies() -> nn.Module:
    """A learned complex filter in the frequencies of an image."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(m.filter)
        x = x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")
        return m.head(pooled(m.body(x).relu()))

    return Constructed(
        run, stem=conv(3, 24), filter=nn.Parameter(normal(24, 16, 9, 2)), body=conv(24, 32), head=nn.Linear(32, CLASSES)
    )


def rotated_pairs() -> nn.Module:
    """Pairs of features as complex numbers, turned by angles: pairs go whole."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.view_as_complex(m.turn)
        return m.head(m.outer(torch.view_as_real(pairs).flatten(-2)).relu())

    return Constructed(
        run, inner=nn.Linear(24, 48), turn=nn.Parameter(normal(24, 2)), outer=nn.Linear(48, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def standardised() -> nn.Module:
    """Weights standardised by a BatchNorm over their own entries (BiT): over the inputs that stay."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        for layer in (m.first, m.second, m.third):
            weight = functional.batch_norm(
                layer.weight.reshape(1, layer.out_channels, -1), None, None, training=True, momentum=0.0
            )
            x = functional.conv2d(x, weight.reshape_as(layer.weight), padding=1).relu()
        return m.head(pooled(x))

    return Constructed(
        run, first=conv(3, 16), second=conv(16, 24), third=conv(24, 32), head=nn.Linear(32, CLASSES)
    )  # fmt: skip


def narrow_windows() -> nn.Module:
    """Steps pooled in pairs with features as the other image dimension, as Funnel does."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(m.inner(x)[:, None], (2, 1), (2, 1), ceil_mode=True)[:, 0]
        return m.head(m.outer(x).relu())

    return Constructed(run, inner=nn.Linear(24, 48), outer=nn.Linear(48, 32), head=nn.Linear(32, CLASSES))


def overlapping_chunks() -> nn.Module:
    """Chunks of 4 steps, each shared half with the next one, by `as_strided`, as in Longformer."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.inner(x).contiguous()
        batch, steps, width = x.shape
        chunks = x.as_strided((batch, steps // 2 - 1, 4, width), (steps * width, 2 * width, width, 1))
        return m.head(m.outer(chunks.amax(2)).relu())

    return Constructed(run, inner=nn.Linear(24, 48), outer=nn.Linear(48, 32), head=nn.Linear(32, CLASSES))


def shuffled_natively() -> nn.Module:
    """`channel_shuffle` as one operator."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.channel_shuffle(m.first(m.stem(x).relu()).relu(), 4)
        return m.head(pooled(m.second(x).relu()))

    return Constructed(
        run, stem=conv(3, 32), first=conv(32, 32, groups=4), second=conv(32, 32, groups=4), head=nn.Linear(32, CLASSES)
    )


def filled_in() -> nn.Module:
    """Features of an image take the places of the tokens that stand for it, as in LLaVA; answers every step."""

    def run(m: Constructed, words: Tensor, image: Tensor) -> Tensor:
        x, seen = m.embedding(words), m.seen(image)
        here = (words == 1)[..., None].expand_as(x)
        return m.head(m.hidden(x.masked_scatter(here, seen)).relu())

    return Constructed(
        run, embedding=nn.Embedding(40, 32), seen=nn.Linear(24, 32), hidden=nn.Linear(32, 64),
        head=nn.Linear(64, CLASSES),
    )  # fmt: skip


def words_and_image(variant: int) -> tuple[Any, ...]:
    """The first 3 words stand for the image."""
    words = integers(40, 2 + variant, 8 + variant, seed=variant)
    words[:, :3] = 1
    return (words, normal(2 + variant, 3, 24, seed=variant))


def graph(variant: int) -> tuple[Any, ...]:
    """Nodes, and pairs of their numbers."""
    nodes = 10 + 3 * variant
    return (normal(nodes, 24, seed=variant), integers(nodes, 2, 30 + variant, seed=variant))


OPERATORS = [
    Specimen("weight_norms", weight_norms, images(16, 16)),
    Specimen("spectral_norms", spectral_norms, images(16, 16, grow=0)),
    Specimen("triangles", triangles, SEQUENCES),
    # ONNX has no distances between few points.
    Specimen("bilinear", bilinear, SEQUENCES, export=False),
    Specimen("bags", bags, lambda variant: (integers(40, 3 + variant, 7, seed=variant),)),
    Specimen("scattered", scattered, graph),
    Specimen("frequencies", frequencies, images(16, 16, grow=0)),
    Specimen("rotated_pairs", rotated_pairs, SEQUENCES),
    Specimen("standardised", standardised, images(16, 16)),
    Specimen("narrow_windows", narrow_windows, SEQUENCES),
    Specimen("overlapping_chunks", overlapping_chunks, tensors((2, 8, 24), (3, 12, 24))),
    Specimen("shuffled_natively", shuffled_natively, images(16, 16)),
    Specimen("filled_in", filled_in, words_and_image),
]
