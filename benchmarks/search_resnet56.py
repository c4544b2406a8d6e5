"""ResNet-56 on the JPEG CIFAR set: the planner against the fastest int8 peer, and against a small network made plainly.

    python benchmarks/search_resnet56.py --data DIR --minutes 90 --out benchmarks/results/search_resnet56.json

1. `tersor.compress(..., recipe=Search(...))` with a budget of `--max-drop` at 95 %: search on 2,000, certify on 6,000,
   report on 2,000 of the 10,000 test images; trained on all 50,000 training images, flipped and shifted.
2. The control: ResNet-20 with the weights tuned for these images, distilled from ResNet-56 for as many steps as the
   winner was trained, quantized by `quantize_static` (its faster peer setting).
3. Both peers on ResNet-56 - NNCF on OpenVINO, `quantize_static` with QUInt8 activations on ONNX Runtime - beside the
   winner and the control: latency at batch 1 in one interleaved run, accuracy on the same 6,000 certify images.

`--run` keeps the search's directory; called again, it goes on where it was. `--skip-control` leaves the control out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from environment import describe
from int8_peers import (
    MAKERS,
    _names_of,
    make_in_process,
    paired_interval,
    signature,
    with_quantize_static,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tersor
from cifar_resnet import MEAN, STD, JpegImages, pretrained
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.runtimes import Loaded, get_runtime
from tersor.runtimes.eager import TorchSession
from tersor.search import Search
from tersor.train import Schedule

SEED = 0
PEERS = ("nncf openvino int8", "quantize_static int8")
SEARCH, CERTIFY = 2_000, 6_000
SHIFT = 4  # pixels
SCHEDULE = Schedule(lr=0.03, batch_size=128, channels_last=True)


class Views(Dataset[tuple[Tensor, int]]):
    """Training images as bytes, flipped and shifted; view `i` is the same whenever it is asked for."""

    def __init__(self, source: JpegImages, views: int) -> None:
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        self.pixels = torch.stack(
            [((source[n][0] * std + mean) * 255).round().to(torch.uint8) for n in range(len(source))]
        )
        self.labels = torch.as_tensor(np.asarray(source.labels))
        self.mean, self.std, self.views = mean, std, views

    def __len__(self) -> int:
        return self.views * len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = index % len(self.pixels)
        image = self.pixels[number]
        flip, down, right = np.random.default_rng(index).integers(0, (2, 2 * SHIFT + 1, 2 * SHIFT + 1))
        if flip:
            image = image.flip(2)
        image = torch.nn.functional.pad(image, (SHIFT,) * 4)[:, down : down + 32, right : right + 32]
        return (image.float() / 255 - self.mean) / self.std, int(self.labels[number])


def task_of(data: Path, views: int) -> tersor.Task:
    """Views of the training images; the test images for everything that measures."""
    train, test = JpegImages(data / "cifar10/jpeg_train.npz"), JpegImages(data / "cifar10/jpeg_test.npz")
    order: list[Any] = np.random.default_rng(SEED).permutation(len(test)).tolist()
    plain: list[Any] = np.random.default_rng(SEED).permutation(len(train))[:500].tolist()
    return tersor.Task(
        train=Views(train, views),
        calibrate=Subset(train, plain),
        search=Subset(test, order[:SEARCH]),
        certify=Subset(test, order[SEARCH : SEARCH + CERTIFY]),
        report=Subset(test, order[SEARCH + CERTIFY :]),
        seed=SEED,
    )


def control(options: argparse.Namespace, task: tersor.Task, steps: int, out: Path) -> None:
    """ResNet-20, distilled for so many steps, quantized by the peer."""
    student = pretrained(options.data, 20)
    epochs = -(-steps // SCHEDULE.steps_per_epoch(len(task.splits["train"])))
    tersor.distill.train(
        student,
        pretrained(options.data, 56),
        task,
        schedule=SCHEDULE.model_copy(update={"epochs": epochs, "max_steps": steps}),
        seed=SEED,
    )
    with_quantize_static(options.threads, student.eval(), options.data, out, reduce_range=False)


def compared(options: argparse.Namespace, task: tersor.Task, places: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    """Latency and accuracy of all contestants.

    Args:
        options: Of the command line.
        task: For the certify images.
        places: Name -> runtime and directory of the model files.
    """
    model = pretrained(options.data, 56)
    eager = tersor.Target("eager", threads=options.threads)
    found: dict[str, Contestant] = {
        "pytorch eager float32": Contestant(partial(TorchSession, model, signature(model, eager), eager))
    }
    for name, (runtime, directory) in places.items():
        place = tersor.Target(runtime, threads=options.threads)
        found[name] = Contestant(
            Loaded(get_runtime(runtime), directory, _names_of(directory, model, place), place), (runtime,)
        )
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    protocol = Protocol(rounds=options.rounds, round_seconds=0.4, warmup_calls=20)
    times = latency(found, tersor.core.batch.Batch((image,), {}, None), threads=options.threads, protocol=protocol)
    fastest = min(PEERS, key=lambda name: times[name].latency.median)
    loader = DataLoader(Subset(task.splits["certify"].dataset, list(task.splits["certify"].indices)), 100)
    right = {}
    for name, contestant in found.items():
        session = contestant.factory()
        with torch.no_grad():
            answers = [(torch.as_tensor(session(x)).argmax(1) == y).double() for x, y in loader]
        right[name] = torch.cat(answers).numpy()
    return {
        "n": len(right["pytorch eager float32"]),
        "fastest_peer": fastest,
        "rows": {
            name: {
                "latency_ms": measured.latency.model_dump(exclude={"histogram"}),
                "of_fastest_peer": paired_ratio(measured.latency, times[fastest].latency),
                "top1_percent": 100 * float(right[name].mean()),
                **paired_interval(right["pytorch eager float32"], right[name]),
            }
            for name, measured in times.items()
        },
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--max-drop", type=float, default=0.02)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--views", type=int, default=4, help="augmented views of each training image")
    parser.add_argument("--run", type=Path, default=None, help="directory of the search; a temporary one by default")
    parser.add_argument("--skip-control", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/search_resnet56.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task, model = task_of(options.data, options.views), pretrained(options.data, 56)
    with tempfile.TemporaryDirectory() as path:
        scratch = Path(path)
        run = tersor.compress(
            model,
            task,
            out=options.run or scratch / "run",
            budget=tersor.Budget(max_drop=options.max_drop),
            target=tersor.Target("onnxruntime", threads=options.threads),
            recipe=Search(minutes=options.minutes, trials=options.trials, refine=1, schedule=SCHEDULE),
            seed=SEED,
        )
        record = run.report.search
        assert record is not None
        places = {"tersor": ("onnxruntime", run.artifact)}
        for peer in PEERS:
            make_in_process(
                peer, argparse.Namespace(data=options.data, depth=56, threads=options.threads), scratch / peer
            )
            places[peer] = (MAKERS[peer][0], scratch / peer)
        if not options.skip_control:
            (scratch / "control").mkdir()
            winner = next(trial for trial in record.trials if trial.number == record.chosen)
            control(options, task, _steps(winner.recipe), scratch / "control")
            places["ResNet-20, distilled, quantize_static int8"] = ("onnxruntime", scratch / "control")
        result = {
            "benchmark": "search_resnet56",
            "environment": describe(threads=options.threads, seed=SEED, packages=("nncf", "optuna")),
            "max_drop": options.max_drop,
            "certificate": None if run.report.certificate is None else run.report.certificate.model_dump(mode="json"),
            "verdict": run.report.verdict,
            "search": record.model_dump(mode="json"),
            "compared": compared(options, task, places),
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result["compared"], indent=2), file=sys.stderr)


def _steps(recipe: dict[str, Any]) -> int:
    """Optimizer steps that a recipe trains."""
    trainings = [step["recover"]["schedule"]["max_steps"] for step in recipe["steps"] if "recover" in step]
    return max(1, sum(trainings))


if __name__ == "__main__":
    main()
