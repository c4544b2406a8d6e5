"""One small model for every way in which channels change their place or are normalised.

Shapes: images `[B, 3, H, W]`, answers `[B, CLASSES]` unless stated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images, normal, tensors
from specimens.constructs_joins import CLASSES, Constructed, conv, pooled


def conv_flatten_linear() -> nn.Module:
    """A channel owns the 16 inputs of its pixels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.head(m.hidden(functional.max_pool2d(m.stem(x).relu(), 4).flatten(1)).relu())

    return Constructed(run, stem=conv(3, 24), hidden=nn.Linear(24 * 16, 48), head=nn.Linear(48, CLASSES))


def linear_view_transposed() -> nn.Module:
    """A generator: the outputs of a linear layer become channels of 4 x 4 pixels; answers `[B, 3, 16, 16]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.project(x).view(x.shape[0], -1, 4, 4)
        return m.out(m.norm(m.up(x.relu())).relu()).tanh()

    return Constructed(
        run, project=nn.Linear(16, 32 * 16), up=nn.ConvTranspose2d(32, 24, 4, 2, 1), norm=nn.BatchNorm2d(24),
        out=nn.ConvTranspose2d(24, 3, 4, 2, 1),
    )  # fmt: skip


def transposed_groups() -> nn.Module:
    """Transposed convolutions, grouped and depthwise, whose weights begin with their inputs; `[B, 3, 2H, 2W]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.groups(m.stem(x).relu()).relu()
        return m.out(m.single(x).relu())

    return Constructed(
        run, stem=conv(3, 24), groups=nn.ConvTranspose2d(24, 32, 3, padding=1, groups=4),
        single=nn.ConvTranspose2d(32, 32, 2, 2, groups=32), out=conv(32, 3),
    )  # fmt: skip


def hard_coded_view() -> nn.Module:
    """The width is a number in the code: the stem cannot lose a channel, the hidden layer can."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(m.stem(x).relu(), 2).view(-1, 16 * 4)
        return m.head(m.hidden(x).relu())

    return Constructed(run, stem=conv(3, 16), hidden=nn.Linear(64, 96), head=nn.Linear(96, CLASSES))


def view_of_attribute() -> nn.Module:
    """The width is an attribute of the model, as most code has it."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(m.stem(x).relu(), 2).view(-1, m.width * 4)
        return m.head(m.hidden(x).relu())

    return Constructed(run, stem=conv(3, 16), hidden=nn.Linear(64, 96), head=nn.Linear(96, CLASSES), width=16)


def permute_reshape() -> nn.Module:
    """Channels last, then flattened without contiguity: a channel owns every 24th input."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(m.stem(x).relu(), 3).permute(0, 2, 3, 1)
        return m.head(m.hidden(x.reshape(x.shape[0], -1)).relu())

    return Constructed(run, stem=conv(3, 24), hidden=nn.Linear(24 * 9, 48), head=nn.Linear(48, CLASSES))


def pixel_shuffle() -> nn.Module:
    """Four channels become one of four times the pixels: they go together; answers `[B, 3, 2H, 2W]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        return m.out(m.shuffle(m.up(m.stem(x).relu())).relu())

    return Constructed(run, stem=conv(3, 24), up=conv(24, 64), shuffle=nn.PixelShuffle(2), out=conv(16, 3))


def pixel_unshuffle() -> nn.Module:
    """A channel becomes four."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.pixel_unshuffle(m.stem(x).relu(), 2)
        return m.head(pooled(m.body(x).relu()))

    return Constructed(run, stem=conv(3, 12), body=conv(48, 32), head=nn.Linear(32, CLASSES))


def space_to_depth() -> nn.Module:
    """The same by slices and `cat`, as in Swin and YOLOv5."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return m.head(pooled(m.body(torch.cat(parts, 1)).relu()))

    return Constructed(run, stem=conv(3, 12), body=conv(48, 32), head=nn.Linear(32, CLASSES))


def pad_channels() -> nn.Module:
    """Zeros before and behind the channels; the shortcut of a residual sum (option A)."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head(pooled((m.body(x) + functional.pad(x, (0, 0, 0, 0, 4, 12))).relu()))

    return Constructed(run, stem=conv(3, 16), body=conv(16, 32), head=nn.Linear(32, CLASSES))


def group_norm() -> nn.Module:
    """Mean and deviation of 4 channels each: a whole group may go, if the number of groups follows."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x)).relu()
        return m.head(pooled(m.body(x).relu()))

    return Constructed(run, stem=conv(3, 32), norm=nn.GroupNorm(8, 32), body=conv(32, 32), head=nn.Linear(32, CLASSES))


def instance_norm() -> nn.Module:
    """Mean and deviation of every channel on its own; PReLU with a slope for each."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.slope(m.norm(m.stem(x)))
        return m.head(pooled(m.body(x).relu()))

    return Constructed(
        run, stem=conv(3, 24), norm=nn.InstanceNorm2d(24, affine=True), slope=nn.PReLU(24), body=conv(24, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def normalised_width(norm: nn.Module) -> nn.Module:
    """A norm over all features, between linear layers: they stay, or the norm must be told; `[B, T, 24]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.norm(m.inner(x))
        return m.head(x + m.down(functional.gelu(m.up(x))))

    return Constructed(
        run, inner=nn.Linear(24, 32), norm=norm, up=nn.Linear(32, 128), down=nn.Linear(128, 32),
        head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def shared_norm() -> nn.Module:
    """One BatchNorm for two paths: both lose the same channels."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        a, b = m.norm(m.a(x)).relu(), m.norm(m.b(x)).relu()
        return m.head(pooled(m.left(a) * m.right(b).sigmoid()))

    return Constructed(
        run, a=conv(3, 16), b=conv(3, 16, 5), norm=nn.BatchNorm2d(16), left=conv(16, 24), right=conv(16, 24),
        head=nn.Linear(24, CLASSES),
    )  # fmt: skip


def bare_norm() -> nn.Module:
    """BatchNorm before the convolution, without scale and shift, and local response normalisation."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.body(m.norm(m.stem(x)).relu()).relu()
        return m.head(pooled(m.last(m.local(x)).relu()))

    return Constructed(
        run, stem=conv(3, 24), norm=nn.BatchNorm2d(24, affine=False), body=conv(24, 16), last=conv(16, 32),
        local=nn.LocalResponseNorm(3), head=nn.Linear(32, CLASSES),
    )  # fmt: skip


def other_dimensions() -> nn.Module:
    """Conv1d over `[B, 8, T]`, its channels as the depth of a Conv3d's images."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.norm(m.line(x)).relu()
        x = m.volume(x[:, :, :, None, None].expand(-1, -1, -1, 2, 2)).relu()
        return m.head(x.mean((2, 3, 4)))

    return Constructed(
        run, line=nn.Conv1d(8, 24, 3, padding=1), norm=nn.BatchNorm1d(24), volume=nn.Conv3d(24, 16, 3, padding=1),
        head=nn.Linear(16, CLASSES),
    )  # fmt: skip


def gram() -> nn.Module:
    """Products of all pairs of channels, flattened: a channel owns a row and a column of the next weight's inputs."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = m.stem(x).relu().flatten(2)
        return m.head(m.hidden((x @ x.transpose(1, 2) / x.shape[2]).flatten(1)).relu())

    return Constructed(run, stem=conv(3, 12), hidden=nn.Linear(144, 48), head=nn.Linear(48, CLASSES))


def einsums() -> nn.Module:
    """Two einsums with weights of their own; `[B, T, 24]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = torch.einsum("btc,ch->bth", x, m.first).relu()
        return m.head(torch.einsum("bth,oh->bto", x, m.second).relu())

    first, second = nn.Parameter(normal(24, 64) * 0.2), nn.Parameter(normal(32, 64) * 0.2)
    return Constructed(run, first=first, second=second, head=nn.Linear(32, CLASSES))


def squeezed() -> nn.Module:
    """Pooled to one pixel, squeezed, and a linear layer between that sees `[B, 1, C]`."""

    def run(m: Constructed, x: Tensor) -> Tensor:
        x = functional.adaptive_max_pool2d(m.stem(x).relu(), 1).squeeze(-1).squeeze(-1)
        return m.head(m.hidden(x.unsqueeze(1)).relu().squeeze(1))

    return Constructed(run, stem=conv(3, 32), hidden=nn.Linear(32, 64), head=nn.Linear(64, CLASSES))


SHAPES = [
    Specimen("conv_flatten_linear", conv_flatten_linear, images(16, 16, grow=0)),
    Specimen("linear_view_transposed", linear_view_transposed, tensors((2, 16), (3, 16))),
    Specimen("transposed_groups", transposed_groups, images(16, 16)),
    Specimen("hard_coded_view", hard_coded_view, images(16, 16)),
    Specimen("view_of_attribute", view_of_attribute, images(16, 16)),
    Specimen("permute_reshape", permute_reshape, images(16, 16)),
    Specimen("pixel_shuffle", pixel_shuffle, images(16, 16)),
    Specimen("pixel_unshuffle", pixel_unshuffle, images(16, 16)),
    Specimen("space_to_depth", space_to_depth, images(16, 16)),
    # The zeros are counted in the code: they stay.
    Specimen("pad_channels", pad_channels, images(16, 16)),
    Specimen("group_norm", group_norm, images(16, 16)),
    Specimen("instance_norm", instance_norm, images(16, 16)),
    Specimen("layer_norm", lambda: normalised_width(nn.LayerNorm(32)), tensors((2, 5, 24), (3, 8, 24))),
    Specimen("rms_norm", lambda: normalised_width(nn.RMSNorm(32)), tensors((2, 5, 24), (3, 8, 24))),
    Specimen("shared_norm", shared_norm, images(16, 16)),
    # Local response normalisation looks at the neighbours among the 16 channels: they stay.
    Specimen("bare_norm", bare_norm, images(16, 16)),
    Specimen("other_dimensions", other_dimensions, tensors((2, 8, 12), (3, 8, 16))),
    Specimen("gram", gram, images(16, 16)),
    Specimen("einsums", einsums, tensors((2, 5, 24), (3, 8, 24))),
    Specimen("squeezed", squeezed, images(16, 16)),
]
