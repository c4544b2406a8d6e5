"""Pruned ResNet-56: accuracy one-shot and after two epochs, tersor against Torch-Pruning; sparse weights by four rules.

    python benchmarks/pruning_accuracy.py --data DIR --out benchmarks/results/pruning_accuracy.json
    python benchmarks/pruning_accuracy.py --data DIR --part sparse --out benchmarks/results/sparse_accuracy.json

Everyone removes 30 % of the multiply-accumulates of the same network with the same 512 calibration images, gets its
BatchNorm statistics re-estimated on them, and trains with the same loss, schedule and order of images. The settings
of each side are chosen on 2,000 training images; the 10,000 JPEG test images are looked at once per row.

The network's shortcuts pad channels with zeros. Both sides are also run on a twin that computes the same, with the
padding written as a fixed 1x1 convolution.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from environment import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar_resnet import Block, CifarResNet, JpegImages, pretrained
from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.measure import certify
from tersor.probe import multiply_accumulates, reestimate_batchnorm
from tersor.prune import structured, unstructured
from tersor.train import Schedule, fit

SEED = 0
CALIBRATION, CHOOSING = 512, 2000
SHARE = 0.7
ROUNDS = 4
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


def twin(model: CifarResNet) -> CifarResNet:
    """The same function in a form that Torch-Pruning can prune; changes `model`."""
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


def batches_of(data: Dataset[Any], chosen: list[int], size: int) -> Batches:
    """Batches of chosen images."""
    result = []
    for start in range(0, len(chosen), size):
        items = [data[index] for index in chosen[start : start + size]]
        result.append((torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])))
    return result


def predictions(model: nn.Module, batches: Batches) -> Tensor:
    """Whether each answer is right."""
    with torch.no_grad():
        return torch.cat([model.eval()(images).argmax(1) == labels for images, labels in batches])


def cross_entropy(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """The task's loss."""
    return functional.cross_entropy(outputs, labels)  # type: ignore[arg-type]


def ours(settings: dict[str, Any]) -> Callable[[nn.Module, Batches], nn.Module]:
    """Prunes with tersor."""

    def prune(model: nn.Module, calibration: Batches) -> nn.Module:
        report = structured(
            model, EXAMPLE, target={"macs": SHARE}, data=calibration, loss=cross_entropy, verify="off", **settings
        )
        return report.model

    return prune


def theirs(settings: dict[str, Any]) -> Callable[[nn.Module, Batches], nn.Module]:
    """Prunes with Torch-Pruning: the least ratio that removes as many multiply-accumulates, by bisection."""
    import torch_pruning as tp

    def once(data: Path, calibration: Batches, ratio: float) -> nn.Module:
        net: Any = pretrained(data, 56)
        net = twin(net) if settings["net"] == "twin" else net
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        importance = getattr(tp.importance, settings["importance"])()
        pruner = tp.pruner.BasePruner(
            net,
            EXAMPLE,
            importance=importance,
            global_pruning=settings["global"],
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            iterative_steps=settings["steps"],
            ignored_layers=[net.linear],
        )
        for _ in range(settings["steps"]):
            if "Taylor" in settings["importance"]:
                net.zero_grad()
                for images, labels in calibration:
                    cross_entropy(net(images), labels).backward()
            pruner.step()
        return net

    def prune(model: nn.Module, calibration: Batches) -> nn.Module:
        whole = multiply_accumulates(model, (EXAMPLE,), {})
        low, high, best = 0.0, 0.8, None
        data: Path = settings["data"]
        for _ in range(7):
            middle = (low + high) / 2
            net = once(data, calibration, middle)
            if multiply_accumulates(net, (EXAMPLE,), {}) <= SHARE * whole:
                high, best = middle, net
            else:
                low = middle
        if best is None:
            raise RuntimeError("Torch-Pruning did not reach the target")
        reestimate_batchnorm(best, calibration)
        return best.eval()

    return prune


def contestants(data: Path) -> dict[str, dict[str, Any]]:
    """Name -> how to prune what."""
    peer = {"data": data}
    both = {"allocation": "global", "normalise": "mean"}
    return {
        "tersor l2": {"prune": ours({**both, "criterion": "l2"}), "net": "native"},
        "tersor l2 compensated": {"prune": ours({**both, "criterion": "l2", "compensate": True}), "net": "native"},
        "tersor l2 compensated, 4 rounds": {
            "prune": ours({**both, "criterion": "l2", "compensate": True, "rounds": ROUNDS}),
            "net": "native",
        },
        "tersor l2 compensated, 4 rounds, twin": {
            "prune": ours({**both, "criterion": "l2", "compensate": True, "rounds": ROUNDS}),
            "net": "twin",
        },
        **{
            f"Torch-Pruning {importance}{'' if steps == 1 else f', {steps} steps'}"
            f"{'' if everywhere else ', local'}{', twin' if net == 'twin' else ''}": {
                "prune": theirs({**peer, "importance": importance, "steps": steps, "global": everywhere, "net": net}),
                "net": net,
            }
            for net in ("native", "twin")
            for importance, steps, everywhere in (
                ("GroupMagnitudeImportance", 1, True),
                ("GroupMagnitudeImportance", ROUNDS, True),
                ("GroupMagnitudeImportance", 1, False),
                ("GroupTaylorImportance", 1, True),
                ("GroupTaylorImportance", ROUNDS, True),
            )
        },
    }


def structured_rows(data: Path, train: Pixels, test: Batches, epochs: int) -> list[dict[str, Any]]:
    """Everyone one-shot; the best of each side, by training images, also after training."""
    order = np.random.default_rng(SEED).permutation(len(train)).tolist()
    calibration = batches_of(train, order[:CALIBRATION], 64)
    choosing = batches_of(train, order[CALIBRATION : CALIBRATION + CHOOSING], 250)
    base = predictions(pretrained(data, 56), test)
    rows, nets = [], {}
    for name, how in contestants(data).items():
        started = time.perf_counter()
        model: nn.Module = pretrained(data, 56)
        model = twin(model) if how["net"] == "twin" else model  # type: ignore[arg-type]
        whole = multiply_accumulates(model, (EXAMPLE,), {})
        net = how["prune"](model, calibration)
        seconds = time.perf_counter() - started
        nets[name] = net
        rows.append(
            {
                "name": name,
                "macs": multiply_accumulates(net, (EXAMPLE,), {}) / whole,
                "parameters": sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in model.parameters()),
                "seconds": seconds,
                "choosing": float(predictions(net, choosing).float().mean()),
                **compared(predictions(net, test), base, "one_shot"),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    train.augment = True
    for side in ("tersor", "Torch-Pruning"):
        best = max((row for row in rows if row["name"].startswith(side)), key=lambda row: row["choosing"])
        losses = recover(nets[best["name"]], train, epochs)
        best |= {"epochs": epochs, "losses": losses}
        best |= compared(predictions(nets[best["name"]], test), base, "trained")
        print(json.dumps(best), flush=True)
    return rows


def recover(net: nn.Module, train: Pixels, epochs: int) -> list[float]:
    """The same training for everyone; the last epoch counts."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(batch.call(module), batch.labels)

    schedule = Schedule(epochs=epochs, lr=0.02, batch_size=128)
    return fit(net, Split("train", train), loss, schedule=schedule, seed=SEED)


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


def sparse_rows(data: Path, train: Pixels, test: Batches) -> list[dict[str, Any]]:
    """Unstructured pruning in one shot, without training."""
    order = np.random.default_rng(SEED).permutation(len(train)).tolist()
    calibration = batches_of(train, order[:CALIBRATION], 64)
    base = predictions(pretrained(data, 56), test)
    rows = []
    for amount in (0.5, 0.7, 0.8):
        for name, settings in {
            "magnitude": {"criterion": "l1"},
            "magnitude, BatchNorm re-estimated": {"criterion": "l1"},
            "obs": {"criterion": "obs", "data": calibration},
            "obc": {"reconstruct": "obc", "data": calibration},
            "obc, BatchNorm re-estimated": {"reconstruct": "obc", "data": calibration},
            "sparsegpt, BatchNorm re-estimated": {"reconstruct": "sparsegpt", "data": calibration},
        }.items():
            started = time.perf_counter()
            report = unstructured(pretrained(data, 56), amount, **settings)  # type: ignore[arg-type]
            if "re-estimated" in name:
                reestimate_batchnorm(report.model, calibration)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "name": name,
                    "amount": amount,
                    "sparsity": report.sparsity,
                    "stored_bytes": report.stored_bytes,
                    "dense_bytes": report.dense_bytes,
                    "seconds": seconds,
                    **compared(predictions(report.model, test), base, "one_shot"),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Runs one part and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("structured", "sparse"), default="structured")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    train = Pixels(options.data / "cifar10/jpeg_train.npz")
    everything = Pixels(options.data / "cifar10/jpeg_test.npz")
    test = batches_of(everything, list(range(len(everything))), 250)
    if options.part == "sparse":
        rows = sparse_rows(options.data, train, test)
    else:
        rows = structured_rows(options.data, train, test, options.epochs)
    result = {
        "environment": describe(threads=options.threads, seed=SEED, packages=("torch-pruning",)),
        "n": len(everything),
        "calibration": CALIBRATION,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
