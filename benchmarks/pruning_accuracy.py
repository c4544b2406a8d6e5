"""Pruned ResNet-56 without training: tersor against Torch-Pruning.

    python benchmarks/pruning_accuracy.py --data DIR --out benchmarks/results/pruning_accuracy.json

Everyone removes 30 % of the multiply-accumulates of the same network with the same calibration images, and gets its
BatchNorm statistics re-estimated on them. The network's shortcuts pad channels with zeros; both sides are also run on
a twin that computes the same, with the padding written as a fixed 1x1 convolution.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cifar_pruning import (
    CALIBRATION,
    EXAMPLE,
    SEED,
    Batches,
    Images,
    compared,
    cross_entropy,
    mean_loss,
    network,
    predictions,
)
from environment import describe
from tersor.probe import multiply_accumulates, reestimate_batchnorm
from tersor.prune import structured

SHARE = 0.7  # of the multiply-accumulates that stays
ROUNDS = 4


class Contestant(NamedTuple):
    """Who prunes, which form of the network, and how: `(data, calibration, share) -> pruned network`."""

    side: str
    form: str
    prune: Callable[[Path, Batches, float], nn.Module]


def ours(form: str, **settings: Any) -> Contestant:
    """Prunes with tersor."""

    def prune(data: Path, calibration: Batches, share: float) -> nn.Module:
        return structured(
            network(data, form),
            EXAMPLE,
            target={"macs": share},
            allocation="global",
            data=calibration,
            loss=cross_entropy,
            verify="off",
            **settings,
        ).model

    return Contestant("tersor", form, prune)


def theirs(form: str, importance: str, *, steps: int = 1, everywhere: bool = True) -> Contestant:
    """Prunes with Torch-Pruning: the least ratio that removes as many multiply-accumulates, by bisection."""
    import torch_pruning as tp

    def once(data: Path, calibration: Batches, ratio: float) -> nn.Module:
        net: Any = network(data, form)
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        pruner = tp.pruner.BasePruner(
            net,
            EXAMPLE,
            importance=getattr(tp.importance, importance)(),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            iterative_steps=steps,
            ignored_layers=[net.linear],
        )
        for _ in range(steps):
            if "Taylor" in importance:
                net.zero_grad()
                for images, labels in calibration:
                    cross_entropy(net(images), labels).backward()
            pruner.step()
        return net

    def prune(data: Path, calibration: Batches, share: float) -> nn.Module:
        whole = multiply_accumulates(network(data, form), (EXAMPLE,), {})
        low, high, best = 0.0, 0.8, None
        for _ in range(8):
            middle = (low + high) / 2
            net = once(data, calibration, middle)
            if multiply_accumulates(net, (EXAMPLE,), {}) <= share * whole:
                high, best = middle, net
            else:
                low = middle
        if best is None:
            raise RuntimeError("Torch-Pruning did not reach the target")
        reestimate_batchnorm(best, calibration)
        return best.eval()

    return Contestant("Torch-Pruning", form, prune)


def contestants() -> dict[str, Contestant]:
    """By name."""
    by_loss = {"criterion": "fisher", "normalise": "cost", "reduction": "sum", "compensate": True}
    found = {
        "tersor l2": ours("native", criterion="l2"),
        "tersor l2, refit": ours("native", criterion="l2", compensate=True),
        f"tersor l2, refit, {ROUNDS} rounds": ours("native", criterion="l2", compensate=True, rounds=ROUNDS),
        "tersor fisher per cost, refit": ours("native", **by_loss),
        f"tersor fisher per cost, refit, {ROUNDS} rounds": ours("native", **by_loss, rounds=ROUNDS),
        "tersor fisher per cost, refit, twin": ours("twin", **by_loss),
    }
    for form in ("native", "twin"):
        suffix = "" if form == "native" else ", twin"
        for name, importance, steps, everywhere in (
            ("magnitude", "GroupMagnitudeImportance", 1, True),
            (f"magnitude, {ROUNDS} steps", "GroupMagnitudeImportance", ROUNDS, True),
            ("magnitude, local", "GroupMagnitudeImportance", 1, False),
            ("taylor", "GroupTaylorImportance", 1, True),
            (f"taylor, {ROUNDS} steps", "GroupTaylorImportance", ROUNDS, True),
        ):
            found[f"Torch-Pruning {name}{suffix}"] = theirs(form, importance, steps=steps, everywhere=everywhere)
    return found


def rows(data: Path, share: float) -> list[dict[str, Any]]:
    """Everyone, one after another."""
    images = Images(data)
    base = predictions(network(data, "native"), images.test)
    result = []
    for name, contestant in contestants().items():
        whole = network(data, contestant.form)
        net = contestant.prune(data, images.calibration, share)
        row: dict[str, Any] = {"name": name, "side": contestant.side, "form": contestant.form}
        row |= {
            "macs": multiply_accumulates(net, (EXAMPLE,), {}) / multiply_accumulates(whole, (EXAMPLE,), {}),
            "parameters": sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in whole.parameters()),
            "choosing_loss": mean_loss(net, images.choosing),
            "choosing_top1": 100 * float(predictions(net, images.choosing).float().mean()),
            **compared(predictions(net, images.test), base, "one_shot"),
        }
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


def main() -> None:
    """Runs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    result = {
        "environment": describe(threads=options.threads, seed=SEED, packages=("torch-pruning",)),
        "n": 10_000,
        "calibration": CALIBRATION,
        "share": options.share,
        "rows": rows(options.data, options.share),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
