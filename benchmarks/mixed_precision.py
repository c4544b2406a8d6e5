"""ResNet-20 with one width for all layers against widths that sensitivity chose, at equal average bits.

    python benchmarks/mixed_precision.py --data DIR --out benchmarks/results/mixed_precision.json

Activations have 8 bits; the first and the last layer keep 8 bits everywhere, so that the uniform model has a few more
bits per weight than its limit, the others never more. Ranges and sensitivity come from training images only; the
10,000 JPEG test images are looked at once per model, in the simulation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from cifar_pruning import SEED, Batches, Pixels, batches_of, compared, predictions, pretrained
from environment import describe
from tersor import Target, Task
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.measure import certify
from tersor.quantize import Mixed, Static, sensitivity

DEPTH, BITS, CALIBRATION, SAMPLES = 20, (3, 4, 5), 500, 128
THREADS = 1


def average(candidate: Candidate, model: torch.nn.Module) -> float:
    """Bits per quantized weight."""
    assert candidate.plan is not None
    sizes = {name: model.get_parameter(name).numel() for name in candidate.plan.weights}
    return sum(quant.scheme.bits * sizes[name] for name, quant in candidate.plan.weights.items()) / sum(sizes.values())


def interval(right: torch.Tensor, other: torch.Tensor) -> list[float]:
    """95 % interval of how many points `right` is better than `other`, paired by image."""
    after, before = right.double().numpy(), other.double().numpy()
    upper = certify(after, before, max_drop=1.0, confidence=0.975)
    lower = certify(before, after, max_drop=1.0, confidence=0.975)
    return [-100 * lower.upper_bound, 100 * upper.upper_bound]


def measured(data: Path) -> dict[str, Any]:
    """Everything that is written."""
    train, test = Pixels(data / "cifar10/jpeg_train.npz"), Pixels(data / "cifar10/jpeg_test.npz")
    calibrate: list[Any] = np.random.default_rng(SEED).permutation(len(train))[:CALIBRATION].tolist()
    images: Batches = batches_of(test, list(range(len(test))), 250)
    model = frozen_copy(pretrained(data, DEPTH))
    target = Target("onnxruntime", threads=THREADS, reduce_range=False)
    context = Context(Task(calibrate=Subset(train, calibrate), seed=SEED), target, model, SEED)
    base = predictions(pretrained(data, DEPTH), images)
    seconds = {}
    for depth in (20, 56):
        for measure in ("output", "fisher"):
            network = frozen_copy(pretrained(data, depth))
            started = time.process_time()
            found = sensitivity(network, context.task, target=target, measure=measure, samples=SAMPLES)
            processor = time.process_time() - started
            seconds[f"resnet{depth} {measure}"] = {"wall": found.seconds, "processor": processor}
            print(f"resnet{depth} {measure}: {found.seconds:.1f} s, processor {processor:.1f} s", flush=True)
    rows = []
    for bits in BITS:
        steps = {
            "uniform": Static(weight_bits=bits),
            "output": Mixed(average_bits=bits, measure="output", sensitivity_samples=SAMPLES),
            "fisher": Mixed(average_bits=bits, measure="fisher", sensitivity_samples=SAMPLES),
        }
        uniform = None
        for name, step in steps.items():
            started = time.perf_counter()
            done = step.apply(Candidate(model), context)
            took = time.perf_counter() - started
            assert done.simulation is not None
            assert done.plan is not None
            right = predictions(done.simulation, images)
            uniform = right if uniform is None else uniform
            rows.append(
                {
                    "limit": bits,
                    "widths": name,
                    "average_bits": average(done, model),
                    "step_seconds": took,
                    **compared(right, base, "quantized"),
                    "over_uniform_points": 100 * float(right.double().mean() - uniform.double().mean()),
                    "over_uniform_interval_points": interval(right, uniform),
                    "chosen": {quant.module: quant.scheme.bits for quant in done.plan.weights.values()},
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "chosen"}, flush=True)
    return {
        "n": len(test),
        "model": f"ResNet-{DEPTH}, CIFAR-10 as JPEG",
        "activation_bits": 8,
        "edge_bits": 8,
        "calibration": CALIBRATION,
        "sensitivity_samples": SAMPLES,
        "choices": list(Mixed.model_fields["choices"].default),
        "float_top1": 100 * float(base.double().mean()),
        "sensitivity_seconds": seconds,
        "rows": rows,
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    result = {"environment": describe(threads=THREADS, seed=SEED), **measured(arguments.data)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
