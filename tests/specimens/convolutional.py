"""Convolutional networks with sums, gates and dense concatenations, with the graph patterns of the originals.

Shapes: images `[B, 3, H, W]`, answers `[B, CLASSES]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images

CLASSES = 10


def convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Convolution, BatchNorm, activation; weights so large that the signal survives many layers."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), activation())


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut: A pads the channels with zeros, B projects (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.shortcut: nn.Module | None = None
        if option == "B" and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.pad:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet, three stages of two blocks."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths, blocks = (16, 32, 64), []
        for stage, width in enumerate(widths):
            blocks.append(BasicBlock(widths[max(stage - 1, 0)], width, 2 if stage else 1, option))
            blocks.append(BasicBlock(width, width, 1, option))
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(functional.relu(self.bn1(self.conv1(x))))
        x = functional.avg_pool2d(x, x.shape[-2:])
        return self.linear(x.view(x.size(0), -1))


class Bottleneck(nn.Module):
    """1x1, 3x3 in groups, an optional gate, 1x1, and a shortcut: ResNeXt and RegNet-Y (and -X without a gate)."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int, groups: int, gate: bool) -> None:
        super().__init__()
        self.reduce = convolution(inputs, width, 1)
        self.grouped = convolution(width, width, 3, stride, groups)
        self.gate = Gate(width, inputs // 4, nn.Sigmoid) if gate else None
        self.expand = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.grouped(self.reduce(x))
        if self.gate is not None:
            out = self.gate(out)
        return torch.relu(self.expand(out) + self.downsample(x))


class ResNeXt(nn.Sequential):
    """Grouped bottlenecks, two stages."""

    def __init__(self, gate: bool, groups: int) -> None:
        super().__init__(
            convolution(3, 32, 3, 2),
            Bottleneck(32, 64, 32, 1, groups, gate),
            Bottleneck(64, 64, 32, 1, groups, gate),
            Bottleneck(64, 128, 64, 2, groups, gate),
            Bottleneck(128, 128, 64, 1, groups, gate),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, CLASSES),
        )


class Gate(nn.Module):
    """Squeeze and excitation: every channel is scaled by what the pooled channels say (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int, scale: type[nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale = scale()

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return self.scale(self.fc2(functional.relu(self.fc1(pooled)))) * x


class InvertedResidual(nn.Module):
    """Expand, depthwise, gate, project; a sum where the shapes allow (Sandler et al., 2018; Howard et al., 2019)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        ratio: int,
        activation: type[nn.Module],
        *,
        gate: type[nn.Module] | None = None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        hidden = inputs * ratio
        layers: list[nn.Module] = [convolution(inputs, hidden, 1, activation=activation)] if ratio != 1 else []
        layers.append(convolution(hidden, hidden, kernel, stride, hidden, activation))
        if gate is not None:
            layers.append(Gate(hidden, hidden // 4, gate))
        layers.append(nn.Conv2d(hidden, outputs, 1, bias=False))
        layers.append(nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals with ReLU6, the first without expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, 16, 3, 2, activation=nn.ReLU6),
            InvertedResidual(16, 16, 1, 1, nn.ReLU6),
            InvertedResidual(16, 24, 2, 4, nn.ReLU6),
            InvertedResidual(24, 24, 1, 4, nn.ReLU6),
            InvertedResidual(24, 32, 1, 4, nn.ReLU6),
            convolution(32, 96, 1, activation=nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(96, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class MobileNetV3(nn.Module):
    """Inverted residuals with gates and Hardswish, two linear layers as a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, 16, 3, 2, activation=nn.Hardswish),
            InvertedResidual(16, 16, 1, 1, nn.ReLU, gate=nn.Hardsigmoid),
            InvertedResidual(16, 24, 2, 4, nn.ReLU),
            InvertedResidual(24, 24, 1, 4, nn.Hardswish, gate=nn.Hardsigmoid, kernel=5),
            convolution(24, 96, 1, activation=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(96, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class EfficientNet(nn.Module):
    """Inverted residuals with gates, SiLU and 5x5 kernels (Tan and Le, 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = convolution(3, 16, 3, 2, activation=nn.SiLU)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 1, 1, nn.SiLU, gate=nn.Sigmoid),
            InvertedResidual(16, 24, 2, 6, nn.SiLU, gate=nn.Sigmoid),
            InvertedResidual(24, 24, 1, 6, nn.SiLU, gate=nn.Sigmoid),
            InvertedResidual(24, 40, 2, 6, nn.SiLU, gate=nn.Sigmoid, kernel=5),
            InvertedResidual(40, 40, 1, 6, nn.SiLU, gate=nn.Sigmoid, kernel=5),
        )
        self.conv_head = convolution(40, 128, 1, activation=nn.SiLU)
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_head(self.blocks(self.conv_stem(x)))
        return self.classifier(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3 over all that came before."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(functional.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(functional.relu(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Every layer sees the outputs of all before it."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Two dense blocks, growth 12, a transition between them (Huang et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        growth = 12
        self.stem = nn.Conv2d(3, 24, 3, 2, 1, bias=False)
        self.block1 = DenseBlock([DenseLayer(24 + growth * layer, growth) for layer in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(60), nn.ReLU(), nn.Conv2d(60, 30, 1), nn.AvgPool2d(2))
        self.block2 = DenseBlock([DenseLayer(30 + growth * layer, growth) for layer in range(3)])
        self.norm = nn.BatchNorm2d(66)
        self.classifier = nn.Linear(66, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block2(self.transition(self.block1(self.stem(x)))))
        return self.classifier(functional.adaptive_avg_pool2d(functional.relu(x), (1, 1)).flatten(1))


CONVOLUTIONAL = [
    Specimen("resnet_a", lambda: ResNet("A"), images()),
    Specimen("resnet_b", lambda: ResNet("B"), images()),
    Specimen("resnext", lambda: ResNeXt(gate=False, groups=8), images()),
    Specimen("regnet", lambda: ResNeXt(gate=True, groups=4), images()),
    Specimen("mobilenet_v2", MobileNetV2, images()),
    Specimen("mobilenet_v3", MobileNetV3, images()),
    Specimen("efficientnet", EfficientNet, images()),
    Specimen("densenet", DenseNet, images()),
]
