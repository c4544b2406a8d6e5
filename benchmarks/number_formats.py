"""What rounding the weights of ResNet-56 to each number format costs: signal to noise, and bytes.

    python benchmarks/number_formats.py --data DIR --out benchmarks/results/number_formats.json

Every weight of a convolution or linear layer is quantized, nothing is trained. The ratio is of the squares summed over
all of them; bytes are packed codes, scales, zero points and tables. Single precision is the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from environment import describe
from tersor import quantize
from tersor.quantize import Granularity, Quantized

WEIGHTS = "weights/cifar10_jpeg_resnet56.safetensors"
BLOCK = Granularity.block(64)
GRAINS: dict[str, Granularity | str] = {"tensor": "tensor", "channel": "channel", "block of 64": BLOCK}


def formats() -> dict[tuple[str, int, str], Callable[[torch.Tensor], Quantized]]:
    """By name, bits and granularity."""
    found: dict[tuple[str, int, str], Callable[[torch.Tensor], Quantized]] = {}
    for grain, granularity in GRAINS.items():
        shared = {"granularity": granularity}
        for bits in (2, 3, 4, 5, 6, 7, 8, 16):
            found["uniform", bits, grain] = partial(quantize.uniform, bits=bits, **shared)
        for bits in (2, 3, 4, 8):
            found["uniform affine", bits, grain] = partial(quantize.uniform, bits=bits, symmetric=False, **shared)
            found["uniform mse", bits, grain] = partial(quantize.uniform, bits=bits, range_method="mse", **shared)
            found["normal float", bits, grain] = partial(quantize.normal_float, bits=bits, **shared)
        for bits in (3, 4, 5, 6, 8):
            found["power of two", bits, grain] = partial(quantize.power_of_two, bits=bits, **shared)
            found["additive powers of two", bits, grain] = partial(quantize.additive_powers_of_two, bits=bits, **shared)
        found["float8 e4m3", 8, grain] = partial(quantize.float8, **shared)
        found["float8 e5m2", 8, grain] = partial(quantize.float8, kind="e5m2", **shared)
    for bits in (2, 3, 4, 5, 6, 8):
        found["codebook", bits, "tensor"] = partial(quantize.codebook, bits=bits)
        found["codebook optimal", bits, "tensor"] = partial(quantize.codebook, bits=bits, initial="optimal")
    for bits in (2, 3, 4):
        found["codebook", bits, "channel"] = partial(quantize.codebook, bits=bits, granularity="channel")
    for bits in (3, 4):
        found["normal float double", bits, "block of 64"] = partial(quantize.normal_float, bits=bits, double=True)
    found["float16", 16, "none"] = quantize.float16
    found["bfloat16", 16, "none"] = quantize.bfloat16
    return found


def measure(quantized: Callable[[torch.Tensor], Quantized], weights: list[torch.Tensor]) -> dict[str, float]:
    """SQNR in dB over all weights, bytes, seconds."""
    started = time.perf_counter()
    results = [quantized(weight) for weight in weights]
    seconds = time.perf_counter() - started
    pairs = zip(results, weights, strict=True)
    noise = sum(float((found.dequantize().double() - weight.double()).square().sum()) for found, weight in pairs)
    signal = sum(float(weight.double().square().sum()) for weight in weights)
    return {
        "sqnr_db": 10 * math.log10(signal / noise),
        "bytes": sum(found.size_bytes for found in results),
        "seconds": seconds,
    }


def main() -> None:
    """Runs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    state = load_file(options.data / WEIGHTS)
    weights = [tensor for tensor in state.values() if tensor.is_floating_point() and tensor.ndim > 1]
    rows: list[dict[str, Any]] = []
    for (name, bits, grain), quantized in formats().items():
        rows.append({"name": name, "bits": bits, "granularity": grain, **measure(quantized, weights)})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "environment": describe(threads=options.threads, seed=0),
        "tensors": len(weights),
        "entries": sum(weight.numel() for weight in weights),
        "float32_bytes": sum(4 * weight.numel() for weight in weights),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
