"""Unstructured pruning of ResNet-56 in one shot, without training, by four rules.

python benchmarks/sparse_accuracy.py --data DIR --out benchmarks/results/sparse_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from cifar_pruning import CALIBRATION, SEED, Images, compared, network, predictions
from environment import describe
from tersor.probe import reestimate_batchnorm
from tersor.prune import unstructured

AMOUNTS = (0.5, 0.7, 0.8)


def rows(data: Path) -> list[dict[str, Any]]:
    """Every rule at every amount."""
    images = Images(data)
    base = predictions(network(data, "native"), images.test)
    result = []
    for amount in AMOUNTS:
        for name, settings in {
            "magnitude": {"criterion": "l1"},
            "magnitude, BatchNorm re-estimated": {"criterion": "l1"},
            "obs": {"criterion": "obs", "data": images.calibration},
            "obc": {"reconstruct": "obc", "data": images.calibration},
            "obc, BatchNorm re-estimated": {"reconstruct": "obc", "data": images.calibration},
            "sparsegpt, BatchNorm re-estimated": {"reconstruct": "sparsegpt", "data": images.calibration},
        }.items():
            started = time.perf_counter()
            report = unstructured(network(data, "native"), amount, **settings)  # type: ignore[arg-type]
            if "re-estimated" in name:
                reestimate_batchnorm(report.model, images.calibration)
            row = {
                "name": name,
                "amount": amount,
                "sparsity": report.sparsity,
                "stored_bytes": report.stored_bytes,
                "dense_bytes": report.dense_bytes,
                "seconds": time.perf_counter() - started,
                **compared(predictions(report.model, images.test), base, "one_shot"),
            }
            result.append(row)
            print(json.dumps(row), flush=True)
    return result


def main() -> None:
    """Runs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    result = {
        "environment": describe(threads=options.threads, seed=SEED),
        "n": 10_000,
        "calibration": CALIBRATION,
        "rows": rows(options.data),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
