"""One small model for every way in which modules, parameters, inputs and outputs are used.

Shapes: images `[B, 3, H, W]`, sequences `[B, T, 24]`, answers `[B, CLASSES]` unless stated.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from specimens.base import Specimen, images, integers, normal, tensors
from specimens.constructs_joins import CLASSES, Constructed, conv, pooled

SEQUENCES = tensors((2, 5, 24), (3, 8, 24))
TOKENS = tensors((2, 12, 24), (3, 16, 24))  # enough to choose every expert that can be chosen


def gate_and_hardswish() -> nn.Module:
    """Squeeze and excitation with linear layers, Hardswish."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.hardswish(m.stem(x))
        gate = m.expand(m.squeeze(pooled(x)).relu())
        x = x * functional.hardsigmoid(gate).view(*gate.shape, 1, 1)
        return m.head(pooled(m.body(x).relu()))

    return Constructed(
        run, stem=conv(3, 32), squeeze=nn.Linear(32, 16), expand=nn.Linear(16, 32), body=conv(32, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def activations() -> nn.Module:
    """Functional activations of which some do not keep zero; a removed channel must not leave `sigmoid(0)` behind."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = torch.clamp(functional.leaky_relu(m.a(x), 0.1), -1, 2)
        x = torch.sigmoid(m.b(x)) + 0.5
        x = functional.softplus(m.c(x)) * functional.elu(m.d(x))
        return m.head(pooled(functional.glu(m.e(torch.where(x > 1, x, x.exp() - 1)), 1)))

    return Constructed(
        run, a=conv(3, 16), b=conv(16, 24), c=conv(24, 16), d=conv(24, 16), e=conv(16, 48), head=nn.Linear(24, CLASSES)
    )


def raw_parameters() -> nn.Module:
    """Class token, positions, layer scale around a convolution and an MLP; images of 16 x 16 only."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        x = x + m.scale * m.down(functional.gelu(m.up(x)))
        return m.head(x[:, 0] * m.temperature + x.mean(1))

    return Constructed(
        run, patches=nn.Conv2d(3, 32, 4, 4), token=nn.Parameter(normal(1, 1, 32)), head=nn.Linear(32, CLASSES),
        positions=nn.Parameter(normal(1, 17, 32)), scale=nn.Parameter(normal(32)), up=nn.Linear(32, 128),
        down=nn.Linear(128, 32), temperature=nn.Parameter(torch.tensor(1.5)),
    )  # fmt: skip


def functional_weights() -> nn.Module:
    """Weights without modules: `F.linear`, `F.conv2d`, `@`, and a buffer that scales every channel."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.bias = nn.Parameter(normal(24, 3, 3, 3) * 0.3), nn.Parameter(normal(24))
            self.register_buffer("scale", normal(24, 1, 1, seed=3))
            self.first, self.second = nn.Parameter(normal(24, 64) * 0.2), nn.Parameter(normal(CLASSES, 64) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.conv2d(x, self.kernel, self.bias, padding=1) * self.scale
            return functional.linear((pooled(x.relu()) @ self.first).relu(), self.second)

    return Functional()


class Heads(nn.Module):
    """Separate queries, keys and values for a number of heads of this size; the width inside is their product."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def parted(self, x: Tensor) -> Tensor:
        """`[B, T, heads * size]` -> `[B, heads, T, size]`."""
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_size).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.parted(self.q(x)), self.parted(self.k(x)), self.parted(self.v(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_size)
        context = (scores if bias is None else scores + bias).softmax(-1) @ v
        return self.out(context.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.num_heads * self.head_size))


def different_heads() -> nn.Module:
    """Layers of 6, 2 and 4 heads of other sizes."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + layer(x)
        return m.head(x)

    layers = nn.ModuleList([Heads(24, 6, 8), Heads(24, 2, 12), Heads(24, 4, 4)])
    return Constructed(run, layers=layers, head=nn.Linear(24, CLASSES))


class WindowStage(nn.Module):
    """Attention in windows with a table of relative positions, then patch merging, as in Swin; `[B, H, W, C]`."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window, self.attention, self.norm = window, Heads(width, heads, width // heads), nn.LayerNorm(width)
        self.table = nn.Parameter(normal((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        self.merge_norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        size = self.window
        parts = self.norm(x).view(batch, height // size, size, width // size, size, channels)
        parts = parts.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, channels)
        bias = self.table[self.index.view(-1)].view(size * size, size * size, -1).permute(2, 0, 1).contiguous()
        parts = self.attention(parts, bias[None]).view(batch, height // size, width // size, size, size, channels)
        x = x + parts.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, channels)
        x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.merge(self.merge_norm(x))


def window_merging() -> nn.Module:
    """Two stages of windows, the second with shifted pixels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.first(m.patches(x).permute(0, 2, 3, 1))
        return m.head(m.second(torch.roll(x, (-1, -1), (1, 2))).mean((1, 2)))

    patches = nn.Conv2d(3, 24, 2, 2)
    return Constructed(
        run, patches=patches, first=WindowStage(24, 4, 4), second=WindowStage(48, 6, 2), head=nn.Linear(96, CLASSES)
    )


def called_twice() -> nn.Module:
    """A layer fed by itself, and one called with two different inputs."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        x = m.loop(m.loop(x).relu()).relu()
        return m.head(pooled(m.twice(x) + m.twice(functional.max_pool2d(x, 3, 1, 1))))

    return Constructed(run, stem=conv(3, 24), loop=conv(24, 24), twice=conv(24, 32), head=nn.Linear(32, CLASSES))


def tied_names() -> nn.Module:
    """A weight under two names in two layers, the second the transpose in effect; a module under two names."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        hidden = m.encode(x).relu()
        x = functional.linear(hidden, m.encode.weight.t()) + m.same(hidden)
        return m.head(m.other(x).relu() + m.encode(x))

    encode, other = nn.Linear(24, 64), nn.Linear(24, 64)
    other.weight = encode.weight
    back = nn.Linear(64, 24)
    return Constructed(run, encode=encode, other=other, back=back, same=back, head=nn.Linear(64, CLASSES))


def several_inputs() -> nn.Module:
    """An image, a vector and tokens, by keyword; answers a dictionary with a nested tuple."""

    def run(m: Constructed, image: Tensor, features: Tensor, words: Tensor) -> dict[str, Any]:
        seen = pooled(m.conv(image).relu())
        told = m.embedding(words).mean(1) + m.features(features)
        both = m.joint(torch.cat([seen, told], 1)).relu()
        return {"logits": m.head(both), "more": (m.box(both).sigmoid(), [m.score(both)])}

    return Constructed(
        run, conv=conv(3, 24), embedding=nn.Embedding(50, 32), features=nn.Linear(6, 32), joint=nn.Linear(56, 64),
        head=nn.Linear(64, CLASSES), box=nn.Linear(64, 4), score=nn.Linear(64, 1),
    )  # fmt: skip


def mixed_inputs(variant: int) -> dict[str, Any]:
    """Image, features, words."""
    batch = 2 + variant
    image = normal(batch, 3, 8 + 4 * variant, 8, seed=variant)
    words = integers(50, batch, 5 + variant, seed=variant)
    return {"image": image, "features": normal(batch, 6, seed=variant + 7), "words": words}


def feature_outputs() -> nn.Module:
    """Inner features are an answer of their own: their channels must stay."""

    def run(m: Constructed, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = m.second(m.first(x).relu()).relu()
        return m.head(pooled(m.third(seen).relu())), seen

    return Constructed(run, first=conv(3, 24), second=conv(24, 16), third=conv(16, 32), head=nn.Linear(32, CLASSES))


def frozen() -> nn.Module:
    """Weights that are not trained, in the middle and at the start."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.norm(m.body(m.stem(x).relu())).relu()
        return m.head(pooled(m.last(x).relu()))

    stem, norm = conv(3, 24).requires_grad_(False), nn.BatchNorm2d(32).requires_grad_(False)
    return Constructed(run, stem=stem, body=conv(24, 32), norm=norm, last=conv(32, 32), head=nn.Linear(32, CLASSES))


def unused() -> nn.Module:
    """A submodule that is never called, and a parameter that is never used."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(pooled(m.body(m.stem(x).relu()).relu()))

    return Constructed(
        run, stem=conv(3, 24), body=conv(24, 48), head=nn.Linear(48, CLASSES), extra=nn.Linear(24, 24),
        lonely=nn.Parameter(normal(24)),
    )  # fmt: skip


def data_dependent() -> nn.Module:
    """Another path for bright images, same widths; both variants are dark at their first pixel."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        bright = bool(x[0, 0, 0, 0] > 0)
        x = m.stem(x).relu()
        x = m.bright(x) if bright else m.dark(x)
        return m.head(pooled(m.last(x.relu()).relu()))

    return Constructed(
        run, stem=conv(3, 24), bright=conv(24, 24), dark=conv(24, 24, 1), last=conv(24, 32), head=nn.Linear(32, CLASSES)
    )


class Expert(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Every token goes to the best of 4 experts, or to all by weight; both variants choose all but the last."""

    def __init__(self, every: bool) -> None:
        super().__init__()
        self.every = every
        self.inner, self.router, self.head = nn.Linear(24, 32), nn.Linear(32, 4), nn.Linear(32, CLASSES)
        self.experts = nn.ModuleList(Expert(32, 48) for _ in range(4))
        with torch.no_grad():
            self.router.weight.mul_(5)
            self.router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -50.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        weights = self.router(x).softmax(-1)
        if self.every:
            out = sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
            return self.head(x + out)
        best, chosen = weights.max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            here = chosen == i
            if here.any():
                out[here] = best[here][:, None] * expert(x[here])
        return self.head(x + out)


def made_inside() -> nn.Module:
    """Tensors made in `forward`: noise-free ones of the width of `x`, and zeros of a width written as a number."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        x = m.second(x * torch.linspace(0.5, 1.5, x.shape[-1], device=x.device) + 1)
        state = torch.zeros(x.shape[0], 1, 48, device=x.device)
        return m.head(x.relu() + state)

    return Constructed(run, first=nn.Linear(24, 40), second=nn.Linear(40, 48), head=nn.Linear(48, CLASSES))


def parametrised() -> nn.Module:
    """A weight computed from two parameters: `weight_norm` over the outputs."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(m.last(m.normed(x).relu()).relu())

    return Constructed(run, normed=weight_norm(nn.Linear(24, 48)), last=nn.Linear(48, 64), head=nn.Linear(64, CLASSES))


MODULES = [
    Specimen("gate_and_hardswish", gate_and_hardswish, images()),
    Specimen("activations", activations, images(16, 16)),
    Specimen("raw_parameters", raw_parameters, images(16, 16, grow=0)),
    Specimen("functional_weights", functional_weights, images(16, 16)),
    Specimen("different_heads", different_heads, SEQUENCES),
    Specimen("window_merging", window_merging, images(16, 16)),
    Specimen("called_twice", called_twice, images(16, 16)),
    Specimen("tied_names", tied_names, SEQUENCES),
    Specimen("several_inputs", several_inputs, mixed_inputs),
    # The second convolution's outputs are an answer.
    Specimen("feature_outputs", feature_outputs, images(16, 16)),
    Specimen("frozen", frozen, images(16, 16)),
    Specimen("unused", unused, images(16, 16)),
    # The path that was not seen stays.
    Specimen("data_dependent", data_dependent, images(16, 16), export=False),
    # Which rows are written depends on data; an expert that was not visited follows the others.
    Specimen("experts_routed", partial(Experts, every=False), TOKENS, export=False),
    Specimen("experts_weighed", partial(Experts, every=True), TOKENS),
    # The second layer's width is a number in the code.
    Specimen("made_inside", made_inside, SEQUENCES, least=0.0),  # all widths are fixed by what `forward` makes
    # `weight_norm` ties the outputs of the first layer to two parameters.
    Specimen("parametrised", parametrised, SEQUENCES),
]
