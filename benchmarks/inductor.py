"""A Transformer encoder compiled by `torch.compile`: float32 against int8-dynamic, and the kernels it could use.

    python benchmarks/inductor.py --out benchmarks/results/inductor.json

A BERT of two layers of width 384, 32 tokens, batch 1, random weights (no accuracy is claimed); every contestant in its
own process, interleaved. Then single linear layers, one process, interleaved: PyTorch's own products with integers, and
torchao's where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

import tersor
from environment import describe
from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.signature import Signature, input_names, signature_of
from tersor.core.step import Step
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.quantize import Dynamic, WeightOnly
from tersor.runtimes import Loaded, get_runtime
from tersor.runtimes.eager import TorchSession
from tersor.runtimes.integer_linear import IntegerLinear
from tersor.runtimes.parity import check_parity
from tersor.runtimes.stored_weights import StoredWeight

SEED = 0
WIDTH, TOKENS, LAYERS, VOCABULARY = 384, 32, 2, 1000
OUTPUT = "last_hidden_state"
EAGER = "pytorch eager float32"
STEPS: dict[str, tuple[str, Step | None]] = {
    "inductor float32": ("inductor", None),
    "inductor int8-weights": ("inductor", WeightOnly(bits=8)),
    "inductor int8-dynamic": ("inductor", Dynamic()),
    "onnxruntime float32": ("onnxruntime", None),
    "onnxruntime int8-dynamic": ("onnxruntime", Dynamic()),
}
SHAPES = ((1536, 384, 1), (1536, 384, 32))  # outputs, inputs, rows
GROUP = 32


CONFIG = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    intermediate_size=4 * WIDTH,
)


def signature(model: nn.Module, target: tersor.Target, task: tersor.Task) -> Signature:
    """The model's signature."""
    example = task.example(2)
    output = select_output(example.call(model), OUTPUT)
    return signature_of(input_names(model, example), example, output, target, OUTPUT)


def whole_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, size and parity of the encoder in every runtime and precision."""
    torch.manual_seed(SEED)
    make = partial(BertModel, CONFIG, add_pooling_layer=False)
    model = frozen_copy(make())
    tokens = torch.randint(0, VOCABULARY, (16, TOKENS))
    task = tersor.Task(calibrate={"input_ids": tokens}, output=OUTPUT)
    eager = tersor.Target("eager", threads=arguments.threads)
    contestants = {EAGER: Contestant(partial(TorchSession, model, signature(model, eager, task), eager))}
    result: dict[str, Any] = {EAGER: {}}
    with tempfile.TemporaryDirectory() as path:
        for name, (runtime, step) in STEPS.items():
            target = tersor.Target(runtime, threads=arguments.threads)
            candidate = Candidate(model)
            if step is not None:
                candidate = step.apply(candidate, Context(task, target, model, SEED))
            directory, found = Path(path) / name, signature(model, target, task)
            directory.mkdir()
            files = get_runtime(runtime).export(candidate, task.example(2), directory, signature=found, target=target)
            loaded = Loaded(get_runtime(runtime), directory, found, target, make if runtime == "inductor" else None)
            contestants[name] = Contestant(loaded, () if runtime == "inductor" else (runtime,))
            result[name] = {
                "size_bytes": sum(file.stat().st_size for file in files),
                "parity": check_parity(loaded, candidate, task.example),
            }
            print(f"{name}: parity {result[name]['parity']:.2g}", file=sys.stderr)
        measured = latency(
            contestants,
            Batch((), {"input_ids": tokens[:1]}, None),
            threads=arguments.threads,
            protocol=Protocol(rounds=arguments.rounds, warmup_calls=20),
        )
    times = {name: found.latency for name, found in measured.items()}
    for name, found in times.items():
        result[name]["latency_ms"] = found.model_dump(exclude={"histogram"})
        result[name]["ratio_to_eager"] = paired_ratio(times[EAGER], found)
    return result


def kernels(layer: nn.Linear) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to multiply with the weight of a layer."""
    weight, outputs, inputs = layer.weight.detach(), layer.out_features, layer.in_features
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    stored = StoredWeight(
        "", frozenset(), codes.to(torch.int16), scale, torch.zeros_like(scale).short(), 8, signed=True
    )
    eight, flat = codes.to(torch.int8), scale.flatten()
    grouped = weight.reshape(outputs, -1, GROUP)
    step = grouped.abs().amax(2, keepdim=True) / 7
    four = (grouped / step).round().clamp(-8, 7).add(8).to(torch.int32).reshape(outputs, inputs)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four, 1)
    grids = torch.stack([step.squeeze(2), torch.zeros_like(step.squeeze(2))], -1).transpose(0, 1).contiguous()
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float32, eager": layer,
        "float32, compiled": torch.compile(copy.deepcopy(layer)),
        "int8-dynamic: torch._int_mm": torch.compile(IntegerLinear(stored, layer.bias, turned=False)),
        "int8-weights: decoded at every call": torch.compile(
            lambda x: functional.linear(x, eight.float()) * flat + layer.bias
        ),
        "int8-weights: torch._weight_int8pack_mm": torch.compile(
            lambda x: torch._weight_int8pack_mm(x, eight, flat) + layer.bias
        ),
        "int4-weights: torch._weight_int4pack_mm_for_cpu": torch.compile(
            lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, grids) + layer.bias
        ),
    }
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return found
    for name, config in (
        ("int8-dynamic", Int8DynamicActivationInt8WeightConfig()),
        ("int8-weights", Int8WeightOnlyConfig()),
    ):
        wrapped = nn.Sequential(copy.deepcopy(layer))
        quantize_(wrapped, config)
        found[f"{name}: torchao"] = torch.compile(wrapped)
    return found


def single_layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of the mean time of a call, in milliseconds, and the relative error of the answers."""
    result: dict[str, Any] = {}
    for outputs, inputs, rows in SHAPES:
        torch._dynamo.reset()
        torch.manual_seed(SEED)
        layer, values = nn.Linear(inputs, outputs).requires_grad_(False), torch.randn(rows, inputs)
        contestants = kernels(layer)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        with torch.inference_mode():
            expected = layer(values)
            errors = {
                name: float((call(values) - expected).norm() / expected.norm()) for name, call in contestants.items()
            }
            for _ in range(arguments.rounds):
                for name, call in contestants.items():
                    call(values)
                    count, started = 0, time.perf_counter()
                    while (passed := time.perf_counter() - started) < 0.1:
                        call(values)
                        count += 1
                    times[name].append(1e3 * passed / count)
        result[f"{inputs} -> {outputs}, {rows} rows"] = {
            name: {"median": statistics.median(found), "best": min(found), "worst": max(found), "error": errors[name]}
            for name, found in times.items()
        }
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/inductor.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "benchmark": "inductor",
        "model": f"BERT, {LAYERS} layers of {WIDTH}, {TOKENS} tokens, batch 1, random weights",
        "environment": describe(threads=arguments.threads, seed=SEED, packages=("torchao",)),
        "models": whole_models(arguments),
        "layers_ms": single_layers(arguments),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
