"""MiniLM on SST-2 in int8: tersor against onnxruntime.quantization and NNCF, in one interleaved run.

    python benchmarks/minilm_int8.py --data DIR --encoder DIR --out benchmarks/results/minilm_int8.json

Latency of one sentence of 32 tokens and of 8 sentences of 64, every contestant in its own process, interleaved round
by round; accuracy on the 872 + 2,000 sentences that the model has not seen, with paired intervals; bytes on disk.
Calibration: the same 300 training sentences for everyone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from environment import describe
from int8_peers import paired_interval
from tersor import hf
from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.signature import Signature, input_names, signature_of
from tersor.core.step import Step
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.quantize import Dynamic, Static
from tersor.runtimes import Loaded, get_runtime

SEED = 0
CALIBRATION = 300
SHAPES = ((1, 32), (8, 64))
OURS: dict[str, tuple[str, Step | None]] = {
    "onnxruntime float32": ("onnxruntime", None),
    "openvino float32": ("openvino", None),
    "tersor onnxruntime static int8": ("onnxruntime", Static(samples=CALIBRATION)),
    "tersor onnxruntime dynamic int8": ("onnxruntime", Dynamic()),
    "tersor openvino static int8": ("openvino", Static(samples=CALIBRATION)),
}
RATIOS = (
    ("tersor onnxruntime static int8", "quantize_dynamic int8"),
    ("tersor onnxruntime dynamic int8", "quantize_dynamic int8"),
    ("tersor openvino static int8", "nncf openvino int8"),
)


class Bench:
    """Model, data and where the files go."""

    def __init__(self, data: Path, encoder: Path, scratch: Path, threads: int) -> None:
        self.net = hf.load_model(encoder, data / "weights/minilm_sst2_fp16.safetensors")
        text = data / "text"
        self.task: Task = hf.text_task(
            encoder, train=text / "sst2_train.tsv", report=text / "sst2_dev.tsv", certify=text / "sst2_holdout.tsv"
        )
        self.scratch, self.threads = scratch, threads
        self.seconds: dict[str, float] = {}

    def target(self, runtime: str) -> Target:
        """Batch and length vary."""
        return Target(runtime, threads=self.threads, dynamic=hf.DYNAMIC)

    def signature(self, target: Target) -> Signature:
        """Of the model."""
        example = self.task.example(2)
        with torch.no_grad():
            output = select_output(example.call(self.net), self.task.output)
        return signature_of(input_names(self.net, example), example, output, target, self.task.output)

    def calibration(self) -> list[dict[str, Any]]:
        """The sentences of every peer, one by one."""
        split = self.task.splits["calibrate"]
        chosen = range(min(CALIBRATION, len(split)))
        return [{name: value.numpy() for name, value in split.batch([i]).tensors().items()} for i in chosen]

    def make(self, name: str) -> Loaded:
        """Exports one of ours."""
        runtime_name, step = OURS[name]
        target = self.target(runtime_name)
        candidate = Candidate(self.net)
        started = time.perf_counter()
        if step is not None:
            candidate = step.apply(candidate, Context(self.task, target, self.net, SEED))
        directory, runtime, signature = self.directory(name), get_runtime(runtime_name), self.signature(target)
        runtime.export(candidate, self.task.example(2), directory, signature=signature, target=target)
        self.seconds[name] = time.perf_counter() - started
        return Loaded(runtime, directory, signature, target)

    def directory(self, name: str) -> Path:
        """Where a contestant's files go."""
        found = self.scratch / name.replace(" ", "-").replace(",", "")
        found.mkdir()
        return found

    def quantize_dynamic(self, float_file: Path) -> Loaded:
        """ONNX Runtime's own dynamic int8, scales per channel."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        name = "quantize_dynamic int8"
        directory, target = self.directory(name), self.target("onnxruntime")
        started = time.perf_counter()
        quantize_dynamic(str(float_file), str(directory / "model.onnx"), weight_type=QuantType.QInt8, per_channel=True)
        self.seconds[name] = time.perf_counter() - started
        return Loaded(get_runtime("onnxruntime"), directory, self.signature(target), target)

    def nncf(self, float_file: Path) -> Loaded:
        """NNCF's preset for Transformers."""
        import nncf
        import openvino

        name = "nncf openvino int8"
        directory, target = self.directory(name), self.target("openvino")
        started = time.perf_counter()
        model = openvino.Core().read_model(str(float_file))
        data = nncf.Dataset(self.calibration())
        found = nncf.quantize(model, data, subset_size=CALIBRATION, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(found, str(directory / "model.xml"), compress_to_fp16=False)
        self.seconds[name] = time.perf_counter() - started
        return Loaded(get_runtime("openvino"), directory, self.signature(target), target)


def right_answers(loaded: Callable[[], Any], task: Task) -> Any:
    """1 for each unseen sentence that is answered rightly, one sentence at a time."""
    session, found = loaded(), []
    for role in ("report", "certify"):
        for batch in task.splits[role].batches(1):
            output = torch.as_tensor(batch.call(session))
            found.append(float(output.argmax(1) == torch.as_tensor(batch.labels)))
    return np.array(found)


def inputs(rows: int, tokens: int) -> Batch:
    """Random words without padding."""
    ids = torch.randint(1000, 20_000, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
    return Batch((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark."""
    result: dict[str, Any] = {"benchmark": "minilm_int8", "model": "all-MiniLM-L6-v2, mean pooling, SST-2 head"}
    result["environment"] = describe(threads=arguments.threads, seed=SEED, packages=("nncf", "transformers"))
    with tempfile.TemporaryDirectory() as path:
        bench = Bench(arguments.data, arguments.encoder, Path(path), arguments.threads)
        made = {name: bench.make(name) for name in OURS}
        made["quantize_dynamic int8"] = bench.quantize_dynamic(made["onnxruntime float32"].directory / "model.onnx")
        made["nncf openvino int8"] = bench.nncf(made["openvino float32"].directory / "model.xml")
        result["seconds"] = bench.seconds
        result["size_bytes"] = {
            name: sum(file.stat().st_size for file in loaded.directory.iterdir()) for name, loaded in made.items()
        }
        contestants = {name: Contestant(loaded, (loaded.runtime.package,)) for name, loaded in made.items()}
        for rows, tokens in SHAPES:
            found = latency(
                contestants, inputs(rows, tokens), threads=arguments.threads,
                protocol=Protocol(rounds=arguments.rounds, round_seconds=0.5, warmup_calls=10),
                progress=lambda done, total: print(f"round {done} of {total}", file=sys.stderr),
            )  # fmt: skip
            times = {name: measured.latency for name, measured in found.items()}
            result[f"{rows}x{tokens}"] = {
                name: time.model_dump(exclude={"histogram", "rounds"}) for name, time in times.items()
            }
            result[f"{rows}x{tokens}_time_ratio"] = {
                f"{one} / {other}": paired_ratio(times[one], times[other]) for one, other in RATIOS
            }
        before = right_answers(made["onnxruntime float32"], bench.task)
        result["accuracy"] = {"n": len(before)}
        for name, loaded in made.items():
            after = right_answers(loaded, bench.task)
            result["accuracy"][name] = {"top1_percent": 100 * after.mean(), **paired_interval(before, after)}
            print(f"accuracy: {name} {100 * after.mean():.2f} %", file=sys.stderr)
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/minilm_int8.json")
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(run(arguments), indent=2) + "\n")


if __name__ == "__main__":
    main()
