"""CIFAR students from scratch, with and without a teacher; and a pruned network that recovers with and without one.

    python benchmarks/distillation.py --data DIR --out benchmarks/results/distillation.json

The teacher is the ResNet-56 tuned on the JPEG images. Students see 10,000 of the training images, two views of each
(flipped and cropped at random, drawn once, so that the teacher's answers can be kept on disk), in the same order with
the same schedule; the last step counts. Accuracy is on all 10,000 JPEG test images, which each row looks at once;
weights of the losses are those of the papers, nothing was tuned. `recovery` rows prune half of ResNet-56's
multiply-accumulates and train on the same views. `speed` compares the teacher asked each time with its answers kept,
in processes of their own, in turn. Rows that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from cifar_pruning import compared
from environment import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tersor
from cifar_resnet import CifarResNet, JpegImages, pretrained
from tersor.distill import train
from tersor.train import Schedule

STUDENT, TEACHER = 20, 56
IMAGES, VIEWS, MARGIN, SIZE = 10_000, 2, 4, 32
SCHEDULE = Schedule(epochs=3, lr=0.2, batch_size=128, warmup=0.2)
RECOVERY = Schedule(epochs=1, lr=0.02, batch_size=128)
LATE = [["layer3", "layer3"]]  # features of earlier layers would take gigabytes of disk for every example
KD: list[Any] = [{"kd": {"weight": 0.9, "temperature": 4.0}}, {"task": {"weight": 0.1}}]
LOSSES: dict[str, list[Any]] = {
    "none": ["task"],
    "kd": KD,
    "logit_standardisation": [{"logit_standardisation": {"weight": 9.0}}, {"task": {"weight": 0.1}}],
    "dkd": ["dkd", "task"],
    "dist": ["dist", "task"],
    "mse": ["mse", "task"],
    "hint, kd": [{"hint": {"weight": 1.0, "pairs": LATE}}, *KD],
    # 1000 times a mean over the 64 positions is 16 times the sum that tersor takes
    "attention_transfer": [{"attention_transfer": {"weight": 16.0, "pairs": LATE}}, "task"],
    "similarity_preserving": [{"similarity_preserving": {"weight": 3000.0, "pairs": LATE}}, "task"],
    "crd, kd": [{"crd": {"weight": 0.8, "pairs": LATE}}, *KD],
}
SEEDS = {"none": (0, 1, 2), "kd": (0, 1, 2)}
SPEED_ROUNDS, SPEED_EXAMPLES = 5, 1280


@cache
def views(data: Path, images: int = IMAGES) -> TensorDataset:
    """`VIEWS` random views of each image, `[images · VIEWS, 3, 32, 32]`, with labels."""
    source = JpegImages(data / "cifar10/jpeg_train.npz")
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(source))[:images].tolist()
    pixels = torch.stack([source[index][0] for index in chosen])
    frame = functional.pad(pixels, (MARGIN,) * 4)  # zero is the mean, nearly: images are normalised
    drawn = []
    for _ in range(VIEWS):
        rows, columns = (generator.integers(0, 2 * MARGIN + 1, len(chosen)) for _ in range(2))
        flips = generator.random(len(chosen)) < 0.5
        for index, (row, column, flip) in enumerate(zip(rows, columns, flips, strict=True)):
            view = frame[index, :, row : row + SIZE, column : column + SIZE]
            drawn.append(view.flip(-1) if flip else view)
    labels = torch.from_numpy(np.asarray(source.labels))[chosen].repeat(VIEWS)
    return TensorDataset(torch.stack(drawn), labels)


@cache
def test_images(data: Path) -> tuple[Tensor, Tensor]:
    """All test images and their labels."""
    test = JpegImages(data / "cifar10/jpeg_test.npz")
    return torch.stack([test[index][0] for index in range(len(test))]), torch.from_numpy(np.asarray(test.labels))


def right(model: nn.Module, data: Path) -> Tensor:
    """Whether each test image is answered right."""
    images, labels = test_images(data)
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(250)]) == labels


def student(seed: int) -> nn.Module:
    """A fresh network."""
    torch.manual_seed(seed)
    return CifarResNet(STUDENT)


def show(done: int, total: int, facts: Any) -> None:
    """A line now and then."""
    if done % 100 == 0 or done == total:
        print(f"{time.strftime('%H:%M:%S')} {done}/{total} {dict(facts)}", flush=True)


def from_scratch(name: str, seed: int, data: Path, kept: Path) -> dict[str, Any]:
    """One student."""
    terms, worked = LOSSES[name], time.process_time()
    taught = name != "none"
    task, teacher = tersor.Task(train=views(data)), pretrained(data, TEACHER)
    out = kept if taught else None
    done = train(
        student(seed), teacher, task, losses=terms, schedule=SCHEDULE, seed=seed, out=out, cache=taught, progress=show
    )
    if out is not None:
        (out / "training/training.pt").unlink()
    return {
        "kind": "student",
        "name": name,
        "seed": seed,
        "losses": [term if isinstance(term, str) else dict(term) for term in terms],
        "notes": list(done.notes),
        "top1": 100 * float(right(done.model, data).double().mean()),
        "loss_by_epoch": done.trained.losses,
        "processor_seconds": time.process_time() - worked,
    }


def recovered(name: str, data: Path, kept: Path) -> dict[str, Any]:
    """ResNet-56 without half of its multiply-accumulates, trained with labels or with its original."""
    teacher, worked = pretrained(data, TEACHER), time.process_time()
    images, labels = views(data).tensors
    calibration = [(images[start : start + 64], labels[start : start + 64]) for start in range(0, 512, 64)]
    pruned = tersor.prune.structured(
        teacher, images[:2], target={"macs": 0.5}, criterion="l2", data=calibration, round_to=4
    ).model
    before = right(teacher, data)
    taught = name == "kd"
    done = train(
        pruned, teacher, tersor.Task(train=views(data)), losses=KD if taught else ["task"], schedule=RECOVERY, seed=0,
        out=kept if taught else None, cache=taught, progress=show,
    )  # fmt: skip
    if taught:
        (kept / "training/training.pt").unlink()
    return {
        "kind": "recovery",
        "name": name,
        "seed": 0,
        "pruned_top1": 100 * float(right(pruned, data).double().mean()),
        **compared(right(done.model, data), before, "recovered"),
        "processor_seconds": time.process_time() - worked,
    }


def speed(data: Path, how: str) -> None:
    """One training of ten steps, asked or kept; prints examples per second."""
    images, labels = views(data, SPEED_EXAMPLES // VIEWS).tensors
    task, teacher = tersor.Task(train=(images, labels)), pretrained(data, TEACHER)
    with tempfile.TemporaryDirectory() as out:
        done = train(student(0), teacher, task, losses=KD, schedule=Schedule(), out=out, cache=how == "kept")
    print(done.trained.examples_per_second)


def speeds(data: Path) -> dict[str, Any]:
    """Both, in turn, each in a process of its own."""
    found: dict[str, list[float]] = {"asked": [], "kept": []}
    for _ in range(SPEED_ROUNDS):
        for how, values in found.items():
            command = [sys.executable, __file__, "--data", str(data), "--out", "-", "--speed", how]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))  # noqa: S603
    ratios = [kept / asked for asked, kept in zip(found["asked"], found["kept"], strict=True)]
    spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return {"examples_per_second": found, "n": SPEED_ROUNDS, "threads": torch.get_num_threads(), **spread}


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "tersor-distillation")
    parser.add_argument("--only", help="student, recovery or speed")
    parser.add_argument("--name", help="only this loss")
    parser.add_argument("--speed", choices=("asked", "kept"), help="one measurement, for the script itself")
    options = parser.parse_args()
    if options.speed:
        speed(options.data, options.speed)
        return
    wanted: list[tuple[str, str, int]] = [
        ("student", name, seed) for name in LOSSES for seed in SEEDS.get(name, (0,))
    ] + [("recovery", name, 0) for name in ("none", "kd")]
    for kind, name, seed in wanted:
        result = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
        known = {(row["kind"], row["name"], row["seed"]) for row in result["rows"]}
        if (kind, name, seed) in known or options.only not in (None, kind) or options.name not in (None, name):
            continue
        print(kind, name, seed, flush=True)
        make = from_scratch if kind == "student" else recovered
        arguments = (name, seed) if kind == "student" else (name,)
        row = make(*arguments, options.data, options.kept)  # type: ignore[operator]
        result = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}  # another may have added
        result["rows"].append(row)
        _write(options.out, result, options.data)
    result = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    if options.only in (None, "speed") and "speed" not in result:
        result["speed"] = speeds(options.data)
        _write(options.out, result, options.data)


def _write(path: Path, result: dict[str, Any], data: Path) -> None:
    result["environment"] = describe(threads=torch.get_num_threads(), seed=0)
    result["n"], result["examples"] = len(test_images(data)[1]), IMAGES * VIEWS
    result["schedule"], result["recovery"] = SCHEDULE.model_dump(mode="json"), RECOVERY.model_dump(mode="json")
    result["teacher_top1"] = result.get("teacher_top1") or 100 * float(
        right(pretrained(data, TEACHER), data).double().mean()
    )
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
