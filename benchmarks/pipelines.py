"""Every preset that trains, and `int8` beside them, on ResNet-20: what the deployed file loses, its speed and size.

    python benchmarks/pipelines.py --data DIR --out benchmarks/results/pipelines.json

Training sees 5,000 of the JPEG training images as they are; drop, latency (batch 1, ONNX Runtime, one thread) and size
are those of the report: the drop on 9,000 test images, with its 95 % upper bound as certified on them. Nothing was
tuned: the presets are run as they come. Rows that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from environment import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tersor
from cifar_resnet import JpegImages, pretrained

PRESETS = ("int8", "prune-recover-int8", "iterative-int8", "prune-distill", "shallow-int8", "qat-distill")
TRAIN, REPORT = 5_000, 1_000


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    parts = []
    for name, count in (("train", TRAIN), ("test", None)):
        source = JpegImages(options.data / f"cifar10/jpeg_{name}.npz")
        chosen = np.random.default_rng(0).permutation(len(source))[:count].tolist()
        images = torch.stack([source[index][0] for index in chosen])
        parts.append((images, torch.from_numpy(np.asarray(source.labels))[chosen]))
    train, (images, labels) = parts[0], parts[1]
    task = tersor.Task(
        train=train, report=(images[:REPORT], labels[:REPORT]), certify=(images[REPORT:], labels[REPORT:])
    )
    target, budget = tersor.Target("onnxruntime", threads=1), tersor.Budget(max_drop=0.02)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    for preset in PRESETS:
        if preset in result["rows"]:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            report = tersor.compress(
                pretrained(options.data, 20),
                task,
                out=Path(scratch) / "run",
                budget=budget,
                target=target,
                recipe=preset,
            ).report
        certificate, base, deployed = report.certificate, report.runtime_baseline, report.deployed
        assert certificate is not None
        assert base.latency_ms is not None
        assert deployed.latency_ms is not None
        result["rows"][preset] = {
            "certificate": certificate.model_dump(mode="json"),
            "verdict": report.verdict,
            "latency_ms": deployed.latency_ms.model_dump(mode="json", exclude={"histogram"}),
            "float_latency_ms": base.latency_ms.median,
            "speed_up": report.ratios.latency_same_runtime,
            "size_bytes": deployed.size_bytes,
            "float_size_bytes": base.size_bytes,
            "parameters_pruned": report.coverage.parameters_pruned,
            "history": [[step.name, step.seconds, step.notes] for step in report.history],
            "seconds": time.perf_counter() - started,
        }
        result["environment"] = describe(threads=1, seed=0)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(preset, report.verdict, flush=True)


if __name__ == "__main__":
    main()
