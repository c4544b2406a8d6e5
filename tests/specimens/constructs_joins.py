"""One small model for every way in which channels are joined, split, grouped, moved or frozen.

Shapes: images `[B, 3, H, W]`, answers `[B, CLASSES]` unless stated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images

CLASSES = 4


class Constructed(nn.Module):
    """Named layers, and how they are put together: `run(model, inputs…)`.

    Every layer of the specimen is an attribute, as users write it; only the class is shared.
    """

    def __init__(self, run: Callable[..., object], **layers: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor, **named: Tensor) -> object:
        return self.run(self, *inputs, **named)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps the image size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def pooled(x: Tensor) -> Tensor:
    """Mean over the pixels."""
    return x.mean((2, 3))


def cat_twice() -> nn.Module:
    """The same tensor twice: a channel feeds two slices of the next weight."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        return m.head(pooled(m.second(torch.cat([x, x], 1)).relu()))

    return Constructed(run, first=conv(3, 16), second=conv(32, 24), head=nn.Linear(24, CLASSES))


def cat_flatten() -> nn.Module:
    """Unequal branches, concatenated, flattened over 4 x 4 pixels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = torch.cat([m.narrow(x), m.wide(x), x], 1).relu()
        return m.head(m.hidden(functional.adaptive_avg_pool2d(x, 4).flatten(1)).relu())

    return Constructed(
        run, narrow=conv(3, 8, 1), wide=conv(3, 20, 5), hidden=nn.Linear(31 * 16, 32), head=nn.Linear(32, CLASSES)
    )


def residual_concat() -> nn.Module:
    """Sums of concatenations: which channels belong together shows only at the second sum."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        both = torch.cat([x, m.left(x).relu()], 1)
        both = both + m.wide(both)
        x = m.back(both).relu() + x
        return m.head(pooled(torch.cat([x, both], 1)))

    return Constructed(
        run, stem=conv(3, 16), left=conv(16, 24), wide=conv(40, 40), back=conv(40, 16), head=nn.Linear(56, CLASSES)
    )


def split_unequal() -> nn.Module:
    """`split([8, 24])`, the sizes written as numbers: they must stay, or be rewritten."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        small, large = m.stem(x).relu().split([8, 24], 1)
        return m.head(pooled(torch.cat([m.small(small), m.large(large)], 1).relu()))

    return Constructed(run, stem=conv(3, 32), small=conv(8, 12), large=conv(24, 20), head=nn.Linear(32, CLASSES))


def chunks() -> nn.Module:
    """Three chunks with different fates: one a gate, one a value, one passed on."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        gate, value, rest = m.stem(x).chunk(3, dim=1)
        x = gate.sigmoid() * value
        return m.head(pooled(torch.cat([m.body(x).relu(), rest], 1)))

    return Constructed(run, stem=conv(3, 48), body=conv(16, 24), head=nn.Linear(40, CLASSES))


def slices() -> nn.Module:
    """Slices that overlap, and one with a step; the bounds are numbers."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head(pooled(m.a(x[:, :20]) + m.b(x[:, 12:]) + m.c(x[:, ::2])))

    return Constructed(
        run, stem=conv(3, 32), a=conv(20, 16), b=conv(20, 16), c=conv(16, 16), head=nn.Linear(16, CLASSES)
    )


def unbound() -> nn.Module:
    """`unflatten` and `unbind`: three groups of 16 channels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        a, b, c = m.stem(x).unflatten(1, (3, -1)).unbind(1)
        return m.head(pooled(m.body(a * b.sigmoid() + c).relu()))

    return Constructed(run, stem=conv(3, 48), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def shared_block() -> nn.Module:
    """One block applied to both halves: they must lose the same channels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, 1)
        return m.head(pooled(torch.cat([m.block(a), m.block(b)], 1)))

    block = nn.Sequential(conv(16, 16), nn.BatchNorm2d(16), nn.ReLU())
    return Constructed(run, stem=conv(3, 32), block=block, head=nn.Linear(32, CLASSES))


def depthwise() -> nn.Module:
    """One filter for every channel, then two."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.one(m.stem(x)).relu()
        return m.head(pooled(m.mix(m.two(x).relu()).relu()))

    return Constructed(
        run, stem=conv(3, 24), one=conv(24, 24, groups=24), two=conv(24, 48, groups=24), mix=conv(48, 32, 1),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def grouped() -> nn.Module:
    """Groups of unequal width on both sides: 4 groups of 6 channels become 4 groups of 8."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(pooled(m.mix(m.groups(m.stem(x).relu()).relu()).relu()))

    return Constructed(
        run, stem=conv(3, 24), groups=conv(24, 32, groups=4), mix=conv(32, 32), head=nn.Linear(32, CLASSES)
    )


def shuffled() -> nn.Module:
    """Grouped convolution, channel shuffle, grouped convolution, sum."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        out = m.first(x).relu()
        batch, channels, height, width = out.shape
        out = out.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return m.head(pooled(x + m.second(out)))

    return Constructed(
        run, stem=conv(3, 32), first=conv(32, 32, 1, groups=4), second=conv(32, 32, groups=4),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def one_channel() -> nn.Module:
    """A convolution from one channel to one is not depthwise, and its output scales all channels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head(pooled(m.body(x * m.smooth(m.map(x)).sigmoid()).relu()))

    return Constructed(
        run, stem=conv(3, 24), map=conv(24, 1), smooth=conv(1, 1), body=conv(24, 24), head=nn.Linear(24, CLASSES)
    )


def channel_statistics() -> nn.Module:
    """Mean and maximum over the channels (CBAM): a channel less is another mean, so the stem must stay."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        return m.head(pooled(m.body(x * gate).relu()))

    return Constructed(run, stem=conv(3, 16), gate=conv(2, 1, 7), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def channel_softmax() -> nn.Module:
    """Softmax over the channels: a removed channel is not a channel of zeros."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(pooled(m.body(m.stem(x).softmax(1)).relu()))

    return Constructed(run, stem=conv(3, 16), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def flipped() -> nn.Module:
    """The channels in reverse order are added: the first goes with the last."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head(pooled(m.body(x + x.flip(1)).relu()))

    return Constructed(run, stem=conv(3, 16), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def rolled() -> nn.Module:
    """Every channel is added to its neighbour: all go, or none."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head(pooled(m.body(x + x.roll(1, 1)).relu()))

    return Constructed(run, stem=conv(3, 16), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def selected() -> nn.Module:
    """Channels picked by a list of numbers, one of them twice."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()[:, [3, 0, 7, 7, 12, 5, 1, 15]]
        return m.head(pooled(m.body(x).relu()))

    return Constructed(run, stem=conv(3, 16), body=conv(8, 48), head=nn.Linear(48, CLASSES))


def assigned() -> nn.Module:
    """Two branches written into a fresh tensor, as if by `cat`; and sums in place."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 24, *x.shape[2:])
        out[:, :8] = m.a(x)
        out[:, 8:] = m.b(x)
        out += m.c(x)
        return m.head(pooled(m.body(out.relu_()).relu_()))

    return Constructed(run, a=conv(3, 8), b=conv(3, 16), c=conv(3, 24), body=conv(24, 48), head=nn.Linear(48, CLASSES))


def stacked() -> nn.Module:
    """Branches stacked on a new dimension, weighed by an attention over branches (selective kernels)."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        both = torch.stack([m.small(x).relu(), m.large(x).relu()], 1)
        weights = m.expand(m.squeeze(pooled(both.sum(1))).relu())
        weights = weights.reshape(x.shape[0], 2, -1).softmax(1)[..., None, None]
        return m.head(pooled((both * weights).sum(1)))

    return Constructed(
        run, stem=conv(3, 16), small=conv(16, 24), large=conv(16, 24, 5), squeeze=nn.Linear(24, 12),
        expand=nn.Linear(12, 48), head=nn.Linear(24, CLASSES),
    )  # fmt: skip


JOINS = [
    Specimen("cat_twice", cat_twice, images()),
    Specimen("cat_flatten", cat_flatten, images()),
    Specimen("residual_concat", residual_concat, images()),
    # The sizes of the parts are numbers in the code: the stem (900 of 6100) stays unless they are rewritten.
    Specimen("split_unequal", split_unequal, images()),
    Specimen("chunks", chunks, images()),
    # As above.
    Specimen("slices", slices, images()),
    Specimen("unbound", unbound, images()),
    Specimen("shared_block", shared_block, images()),
    Specimen("depthwise", depthwise, images()),
    Specimen("grouped", grouped, images()),
    Specimen("shuffled", shuffled, images()),
    Specimen("one_channel", one_channel, images()),
    Specimen("channel_statistics", channel_statistics, images()),
    Specimen("channel_softmax", channel_softmax, images()),
    Specimen("flipped", flipped, images()),
    # The stem stays; the body gives half of itself.
    Specimen("rolled", rolled, images()),
    # The numbers are written in the code.
    Specimen("selected", selected, images()),
    # The bounds and the width are written in the code.
    Specimen("assigned", assigned, images()),
    Specimen("stacked", stacked, images()),
]
