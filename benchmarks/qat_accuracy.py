"""ResNet-20 at few bits: quantization-aware training with learned steps and distillation, against plain training.

    python benchmarks/qat_accuracy.py --data DIR --out benchmarks/results/qat_accuracy.json

Every row trains with the same schedule, the same order of images and the same flips and crops: `lsq` learns step sizes
and distils from the float network, `ste` is the baseline, fixed ranges and labels only,
`ste+kd` tells the two apart. The last step counts; nothing
is chosen on the 10,000 test images, which each row looks at once. `static` is post-training quantization, for
comparison. Rows that are in the result already are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cifar_pruning import compared
from environment import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from cifar_resnet import JpegImages, pretrained
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.split import Split
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.distill.losses import kd
from tersor.quantize import Static
from tersor.quantize.qat import Qat
from tersor.train import Schedule

SEED = 0
DEPTH, SIZE, MARGIN = 20, 32, 4
CALIBRATION = 512
TARGET = Target("onnxruntime", threads=2, reduce_range=False)
SCHEDULES = {  # by bits; the higher rate did better on 2,000 training images after 100 steps
    4: Schedule(epochs=1, lr=0.01, batch_size=128, weight_decay=1e-4),
    2: Schedule(epochs=2, lr=0.03, batch_size=128, weight_decay=1e-4),
}


class Images(TensorDataset):
    """Decoded images, flipped and cropped at random a batch at a time if `augment`; channels last."""

    def __init__(self, path: Path, *, augment: bool) -> None:
        source = JpegImages(path)
        mean, std = source.mean, source.std
        pixels = torch.stack([(source[index][0] * std + mean) * 255 for index in range(len(source))])
        self.scale, self.shift = 1 / (255 * std.flatten()), -(mean / std).flatten()
        self.augment = augment
        framed = (mean * 255).round().byte().expand(len(source), 3, SIZE + 2 * MARGIN, SIZE + 2 * MARGIN).clone()
        framed[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN] = pixels.round().byte()
        super().__init__(framed.permute(0, 2, 3, 1).contiguous(), torch.from_numpy(np.asarray(source.labels)).long())

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        framed, labels = self.tensors
        count = len(index)
        place = torch.arange(SIZE).expand(count, SIZE)
        rows, columns = place + MARGIN, place + MARGIN
        if self.augment:
            flipped = torch.rand(count, 1) < 0.5
            rows = place + torch.randint(0, 2 * MARGIN + 1, (count, 1))
            columns = torch.where(flipped, SIZE - 1 - place, place) + torch.randint(0, 2 * MARGIN + 1, (count, 1))
        cropped = framed[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, H, W, 3]
        return (cropped * self.scale + self.shift).permute(0, 3, 1, 2), labels[index]


NAMES = ("lsq", "ste+kd", "ste")


class Row(NamedTuple):
    """One contestant."""

    bits: int
    name: str


# Two bits without training are refused: no prediction of the network is left.
ROWS = [Row(4, "static"), *(Row(bits, name) for bits in SCHEDULES for name in NAMES)]


def step_for(row: Row) -> Static | Qat:
    """What the row does to the network."""
    widths = {"weight_bits": row.bits, "activation_bits": row.bits, "samples": CALIBRATION}
    if row.name == "static":
        return Static(**widths)
    distill = None if row.name == "ste" else "kd"
    return Qat(**widths, schedule=SCHEDULES[row.bits], quantizer=row.name.removesuffix("+kd"), distill=distill)


def right(model: nn.Module, test: Images) -> Tensor:
    """Whether each test image is answered right."""
    found = []
    with torch.no_grad():
        for batch in Split("report", test).batches(250):
            found.append(batch.call(model).argmax(1) == batch.labels)
    return torch.cat(found)


def show(label: str, done: int, total: int) -> None:
    """One line every fifty steps."""
    if done % 50 == 0:
        print(f"{time.strftime('%H:%M:%S')} {label} {done}/{total}", flush=True)


def measure(row: Row, context: Context, test: Images, base: Tensor) -> dict[str, Any]:
    """Quantizes, trains and looks at the test images."""
    step = step_for(row)
    worked = time.process_time()
    done = step.apply(Candidate(frozen_copy(context.original)), context)
    processor = time.process_time() - worked
    return {
        **row._asdict(),
        "step": step.model_dump(mode="json"),
        "processor_seconds": processor,
        "notes": done.history[-1].notes,
        **compared(right(done.runnable, test), base, "quantized"),
    }


def main() -> None:
    """Runs what is not in the result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, choices=sorted(SCHEDULES), help="only these")
    parser.add_argument("--name", choices=("static", *NAMES), help="only this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train = Images(options.data / "cifar10/jpeg_train.npz", augment=True)
    plain = Images.__new__(Images)
    plain.__dict__.update(train.__dict__ | {"augment": False})
    test = Images(options.data / "cifar10/jpeg_test.npz", augment=False)
    original = frozen_copy(pretrained(options.data, DEPTH))
    order = np.random.default_rng(SEED).permutation(len(train))[:CALIBRATION]
    task = Task(train=train, calibrate=Split("calibrate", plain, indices=np.sort(order).tolist()), seed=SEED)
    context = Context(task, TARGET, original, SEED, show, {"kd": kd})
    base = right(original, test)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["bits"], row["name"]) for row in rows}
    for row in ROWS:
        if row in done or options.bits not in (None, row.bits) or options.name not in (None, row.name):
            continue
        rows.append(measure(row, context, test, base))
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "environment": describe(threads=options.threads, seed=SEED),
            "n": len(test),
            "float_top1": 100 * float(base.double().mean()),
            "target": TARGET.model_dump(mode="json"),
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
