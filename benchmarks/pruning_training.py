"""Pruned ResNet-56 after two epochs of recovery: the best of tersor and of Torch-Pruning, trained alike.

    python benchmarks/pruning_training.py --data DIR --chosen benchmarks/results/pruning_accuracy.json \
        --out benchmarks/results/pruning_training.json

The settings of each side are those with the least loss on training images in `--chosen`. Both train with the same
schedule and the same order of images, once on the labels alone and once also on the answers of the network before
(tersor's `recover` with its defaults; Torch-Pruning has no distillation of its own). The last epoch counts. Rows that
are in the result already are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cifar_pruning import EXAMPLE, SEED, Images, compared, cross_entropy, network, predictions
from environment import describe
from pruning_accuracy import contestants
from tersor.core.batch import Batch
from tersor.core.split import Split
from tersor.distill.losses import kd
from tersor.distill.recover import Recover
from tersor.probe import multiply_accumulates
from tersor.train import Schedule, fit

EPOCHS = 2
LESSONS = ("labels", "distilled")


class Job(NamedTuple):
    """One training."""

    name: str
    share: float
    lesson: str
    seed: int


def train(job: Job, data: Path, epochs: int) -> dict[str, Any]:
    """Prunes, trains and measures."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    contestant = contestants()[job.name]
    images = Images(data)
    original = network(data, "native")
    base = predictions(original, images.test)
    net = contestant.prune(data, images.calibration, job.share).to(memory_format=torch.channels_last)
    defaults = Recover()

    def on_labels(module: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(batch.call(module), batch.labels)

    def distilled(module: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            expected = batch.call(original)
        outputs = batch.call(module)
        soft = kd(outputs, expected, defaults.temperature)
        return defaults.alpha * soft + (1 - defaults.alpha) * cross_entropy(outputs, batch.labels)

    images.train.augment = True
    losses = fit(
        net,
        Split("train", images.train),
        on_labels if job.lesson == "labels" else distilled,
        schedule=Schedule(epochs=epochs, lr=0.02, batch_size=128),
        seed=job.seed,
    )
    return {
        **job._asdict(),
        "side": contestant.side,
        "macs": multiply_accumulates(net, (EXAMPLE,), {})
        / multiply_accumulates(network(data, contestant.form), (EXAMPLE,), {}),
        "epochs": epochs,
        "losses": losses,
        **compared(predictions(net, images.test), base, "trained"),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds."""
    result = []
    for key in dict.fromkeys((row["share"], row["side"], row["lesson"]) for row in rows):
        found = [row["trained_top1"] for row in rows if (row["share"], row["side"], row["lesson"]) == key]
        spread = statistics.stdev(found) if len(found) > 1 else None
        result.append(
            {
                "share": key[0],
                "side": key[1],
                "lesson": key[2],
                "seeds": len(found),
                "top1": statistics.mean(found),
                "spread": spread,
            }
        )
    return result


def main() -> None:
    """Trains whatever is not in the result yet, two at a time, one thread each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chosen", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    chosen = json.loads(options.chosen.read_text())
    best = [
        min((row for row in chosen["rows"] if row["side"] == side), key=lambda row: row["choosing_loss"])["name"]
        for side in ("tersor", "Torch-Pruning")
    ]
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {Job(*(row[name] for name in Job._fields)) for row in rows}
    wanted = [
        Job(name, chosen["share"], lesson, seed)
        for seed, lesson, name in itertools.product(range(options.seeds), LESSONS, best)
    ]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(train, job, options.data, EPOCHS) for job in wanted if job not in done]
        for future in as_completed(running):
            rows.append(future.result())
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "environment": describe(threads=1, seed=SEED, packages=("torch-pruning",)),
                "n": 10_000,
                "rows": rows,
                "summary": summary(rows),
            }
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
