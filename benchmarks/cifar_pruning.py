"""What the pruning benchmarks share: images, a twin network, answers compared with the network before.

Everyone gets the same 512 calibration images; settings are chosen on 2,000 other training images; the 10,000 JPEG test
images are looked at once per row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar_resnet import Block, CifarResNet, JpegImages, pretrained
from tersor.measure import certify

SEED = 0
DEPTH = 56
CALIBRATION, CHOOSING = 512, 2000
EXAMPLE = torch.zeros(2, 3, 32, 32)
Batches = list[tuple[Tensor, Tensor]]


class ConvolutionShortcut(nn.Module):
    """The padding shortcut as a 1x1 convolution with fixed weights: every second pixel, channel `c` to `c + p`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        inputs, outputs = block.conv1.in_channels, block.conv1.out_channels
        self.convolution = nn.Conv2d(inputs, outputs, 1, block.stride, bias=False)
        with torch.no_grad():
            self.convolution.weight.zero_()
            for channel in range(inputs):
                self.convolution.weight[channel + block.padding, channel] = 1
        self.convolution.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, C', H / stride, W / stride]`."""
        result: Tensor = self.convolution(x)
        return result


class TwinBlock(nn.Module):
    """A block with the convolution shortcut."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = ConvolutionShortcut(block) if block.padding else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, C', H / stride, W / stride]`."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def network(data: Path, form: str) -> CifarResNet:
    """The trained ResNet-56 in evaluation mode: `native`, or its `twin`, the same function without padding."""
    model = pretrained(data, DEPTH)
    if form == "twin":
        for stage in (model.layer1, model.layer2, model.layer3):
            for index, block in enumerate(stage):
                stage[index] = TwinBlock(block)
    return model.eval()


class Pixels(Dataset[tuple[Tensor, int]]):
    """Decoded images; with `augment` flipped and cropped at random, the same for everyone in the same order."""

    def __init__(self, path: Path, *, augment: bool = False) -> None:
        source = JpegImages(path)
        self.labels, self.mean, self.std, self.augment = source.labels, source.mean, source.std, augment
        self.source = source
        self.images: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self.images:
            self.images[index] = self.source[index][0].half()
        image = self.images[index].float()
        if self.augment:
            if float(torch.rand(())) < 0.5:
                image = image.flip(-1)
            top, left = torch.randint(0, 9, (2,)).tolist()
            image = functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        return image, int(self.labels[index])


class Images:
    """The training images, what calibrates, what settings are chosen by, and the test images."""

    def __init__(self, data: Path) -> None:
        self.train = Pixels(data / "cifar10/jpeg_train.npz")
        order = np.random.default_rng(SEED).permutation(len(self.train)).tolist()
        self.calibration = batches_of(self.train, order[:CALIBRATION], 64)
        self.choosing = batches_of(self.train, order[CALIBRATION : CALIBRATION + CHOOSING], 250)
        everything = Pixels(data / "cifar10/jpeg_test.npz")
        self.test = batches_of(everything, list(range(len(everything))), 250)
        self.n = len(everything)


def batches_of(data: Dataset[Any], chosen: list[int], size: int) -> Batches:
    """Batches of chosen images."""
    result = []
    for start in range(0, len(chosen), size):
        items = [data[index] for index in chosen[start : start + size]]
        result.append((torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])))
    return result


def cross_entropy(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """The task's loss."""
    return functional.cross_entropy(outputs, labels)  # type: ignore[arg-type]


def predictions(model: nn.Module, batches: Batches) -> Tensor:
    """Whether each answer is right."""
    return torch.cat([answers.argmax(1) == labels for answers, labels in _answers(model, batches)])


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Cross entropy; batches are of one size."""
    return sum(float(cross_entropy(answers, labels)) for answers, labels in _answers(model, batches)) / len(batches)


def _answers(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    model.eval().to(memory_format=torch.channels_last)  # a third faster here
    with torch.no_grad():
        for images, labels in batches:
            yield model(images), labels


def compared(right: Tensor, base: Tensor, prefix: str) -> dict[str, Any]:
    """Accuracy in percent, and the drop with its exact paired interval."""
    before, after = base.double().numpy(), right.double().numpy()
    upper = certify(before, after, max_drop=1.0, confidence=0.975)
    lower = certify(after, before, max_drop=1.0, confidence=0.975)
    return {
        f"{prefix}_top1": 100 * float(after.mean()),
        f"{prefix}_drop_points": 100 * upper.drop,
        f"{prefix}_interval_points": [-100 * lower.upper_bound, 100 * upper.upper_bound],
    }
