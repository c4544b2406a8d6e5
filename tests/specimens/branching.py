"""Convolutional networks with branches: splits, shuffles, skips, several outputs.

Shapes: images `[B, 3, H, W]`, answers `[B, CLASSES]` unless stated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images
from specimens.convolutional import CLASSES, convolution


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel `i` of group `g` becomes channel `i * groups + g`."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the other half is worked on; both halves at stride 2 (Ma et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                convolution(inputs, half, 1),
            )
        self.branch2 = nn.Sequential(
            convolution(inputs if stride > 1 else half, half, 1),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            convolution(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """Two stages of shuffled units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = convolution(3, 24, 3, 2)
        self.stage2 = nn.Sequential(ShuffleUnit(24, 48, 2), ShuffleUnit(48, 48, 1), ShuffleUnit(48, 48, 1))
        self.stage3 = nn.Sequential(ShuffleUnit(48, 96, 2), ShuffleUnit(96, 96, 1))
        self.conv5 = convolution(96, 128, 1)
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv5(self.stage3(self.stage2(self.conv1(x)))).mean([2, 3]))


class InceptionBlock(nn.Module):
    """Four branches of unequal width (Szegedy et al., 2015)."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.branch1 = convolution(inputs, widths[0], 1)
        self.branch3 = nn.Sequential(convolution(inputs, 16, 1), convolution(16, widths[1], 3))
        self.branch5 = nn.Sequential(convolution(inputs, 8, 1), convolution(8, widths[2], 5))
        self.branch_pool = convolution(inputs, widths[3], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.branch_pool(functional.max_pool2d(x, 3, 1, 1))
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), pooled], 1)


class Inception(nn.Sequential):
    """A stem and two blocks."""

    def __init__(self) -> None:
        super().__init__(
            convolution(3, 32, 3, 2),
            InceptionBlock(32, (16, 24, 8, 12)),
            nn.MaxPool2d(2),
            InceptionBlock(60, (20, 40, 12, 8)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(80, CLASSES),
        )


class UNet(nn.Module):
    """Down, transposed convolutions up, skips by concatenation (Ronneberger et al., 2015); `[B, 2, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(convolution(3, 16), convolution(16, 16))
        self.down2 = nn.Sequential(convolution(16, 32), convolution(32, 32))
        self.bottom = nn.Sequential(convolution(32, 64), convolution(64, 64))
        self.up2, self.merge2 = nn.ConvTranspose2d(64, 32, 2, 2), convolution(64, 32)
        self.up1, self.merge1 = nn.ConvTranspose2d(32, 16, 2, 2), convolution(32, 16)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        x = self.bottom(functional.max_pool2d(second, 2))
        x = self.merge2(torch.cat([second, self.up2(x)], 1))
        x = self.merge1(torch.cat([first, self.up1(x)], 1))
        return self.out(x)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of `[B, C, H, W]`, written out as in the original ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm and two linear layers on the last dimension, layer scale (Liu et al., 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(self.act(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), ChannelNorm(32))
        self.stage1 = nn.Sequential(ConvNeXtBlock(32), ConvNeXtBlock(32))
        self.down = nn.Sequential(ChannelNorm(32), nn.Conv2d(32, 48, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(48), ConvNeXtBlock(48))
        self.norm = nn.LayerNorm(48, eps=1e-6)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


class C2f(nn.Module):
    """Splits, works on the last part again and again, concatenates all of them, as YOLOv8 does."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool) -> None:
        super().__init__()
        self.c = outputs // 2
        self.shortcut = shortcut
        self.cv1 = convolution(inputs, 2 * self.c, 1, activation=nn.SiLU)
        self.cv2 = convolution(4 * self.c, outputs, 1, activation=nn.SiLU)
        pair = [convolution(self.c, self.c, 3, activation=nn.SiLU) for _ in range(4)]
        self.m = nn.ModuleList([nn.Sequential(*pair[:2]), nn.Sequential(*pair[2:])])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]) if self.shortcut else block(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Pools the same channels three times in a row and concatenates all four."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = convolution(channels, channels // 2, 1, activation=nn.SiLU)
        self.cv2 = convolution(channels * 2, channels, 1, activation=nn.SiLU)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Detect(nn.Module):
    """Boxes and classes at every scale; a list of `[B, 16 + CLASSES, H, W]`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.boxes = nn.ModuleList(nn.Sequential(convolution(w, 16), nn.Conv2d(16, 16, 1)) for w in widths)
        self.classes = nn.ModuleList(nn.Sequential(convolution(w, 16), nn.Conv2d(16, CLASSES, 1)) for w in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        for i in range(len(features)):
            features[i] = torch.cat((self.boxes[i](features[i]), self.classes[i](features[i])), 1)
        return features


class Yolo(nn.Module):
    """C2f backbone, SPPF, a neck that goes up and down again, a head at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 16, 3, 2, activation=nn.SiLU)
        self.stage1 = nn.Sequential(convolution(16, 32, 3, 2, activation=nn.SiLU), C2f(32, 32, shortcut=True))
        self.stage2 = nn.Sequential(convolution(32, 64, 3, 2, activation=nn.SiLU), C2f(64, 64, shortcut=True), SPPF(64))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = C2f(96, 32, shortcut=False)
        self.down = convolution(32, 32, 3, 2, activation=nn.SiLU)
        self.bottom = C2f(96, 64, shortcut=False)
        self.detect = Detect((32, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stage1(self.stem(x))
        coarse = self.stage2(fine)
        fine = self.up(torch.cat([self.upsample(coarse), fine], 1))
        coarse = self.bottom(torch.cat([self.down(fine), coarse], 1))
        return self.detect([fine, coarse])


BRANCHING = [
    # All that pass a shuffled stage hang together: few units, of which half may go.
    Specimen("shufflenet_v2", ShuffleNetV2, images()),
    Specimen("inception", Inception, images()),
    Specimen("unet", UNet, images(16, 16)),
    Specimen("convnext", ConvNeXt, images()),
    Specimen("yolo", Yolo, images()),
]
