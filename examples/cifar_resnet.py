"""Compresses a real CIFAR-10 ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385) to int8 under a budget.

    python examples/cifar_resnet.py --data DIR --depth 56 --target onnxruntime --target openvino --out runs/cifar

DIR holds `cifar10/jpeg_{train,test}.npz` (images as JPEG files: `bytes`, `offsets`, `labels`) and
`weights/cifar10_jpeg_resnet{20,56}.safetensors`. The 10,000 test images are split into search / certify / report
(2,000 / 6,000 / 2,000); training images only calibrate.

Shapes: `B` batch, `C` channels; images are `[B, 3, 32, 32]`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

import tersor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = f"RGB 32x32, scaled to 0..1, then (x - mean) / std with mean {MEAN} and std {STD}"
CALIBRATION = 500


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: every second pixel, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, C', H / stride, W / stride]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-`depth` for 32x32 images; `depth` is 6 n + 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, 32, 32]` -> logits `[B, 10]`."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class JpegImages(Dataset[tuple[Tensor, int]]):
    """CIFAR-10 images that are stored as JPEG files in one array."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.bytes = stored["bytes"].tobytes()
            self.offsets = stored["offsets"]
            self.labels = stored["labels"]
        self.mean = torch.tensor(MEAN)[:, None, None]
        self.std = torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        encoded = self.bytes[self.offsets[index] : self.offsets[index + 1]]
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        return (image - self.mean) / self.std, int(self.labels[index])


def pretrained(data: Path, depth: int) -> CifarResNet:
    """The network with the weights that were tuned on the JPEG images."""
    net = CifarResNet(depth)
    net.load_state_dict(load_file(str(data / f"weights/cifar10_jpeg_resnet{depth}.safetensors")))
    return net.eval()


def cifar_task(data: Path, *, seed: int = 0) -> tersor.Task:
    """The splits: calibration images from training, the test images for everything that measures."""
    train, test = JpegImages(data / "cifar10/jpeg_train.npz"), JpegImages(data / "cifar10/jpeg_test.npz")
    order: list[Any] = np.random.default_rng(seed).permutation(len(test)).tolist()
    calibrate: list[Any] = np.random.default_rng(seed).permutation(len(train))[:CALIBRATION].tolist()
    return tersor.Task(
        calibrate=Subset(train, calibrate),
        search=Subset(test, order[:2000]),
        certify=Subset(test, order[2000:8000]),
        report=Subset(test, order[8000:]),
        class_names=CLASSES,
        preprocessing=PREPROCESSING,
        seed=seed,
    )


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--depth", type=int, choices=(20, 56), default=56)
    parser.add_argument("--target", action="append", help="onnxruntime (default), openvino; may be repeated")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, task = pretrained(arguments.data, arguments.depth), cifar_task(arguments.data)
    for target in arguments.target or ["onnxruntime"]:
        result = tersor.compress(
            model,
            task,
            budget=tersor.Budget(max_drop=arguments.max_drop, rounds=arguments.rounds),
            target=tersor.Target(target, threads=arguments.threads),
            recipe="int8",
            out=arguments.out / target,
        )
        Console().print(result)
        print(f"artifact: {result.artifact}")


if __name__ == "__main__":
    main()
