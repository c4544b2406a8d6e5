"""A character LSTM in few bits: dynamic int8 and weight-only int4, deployed in ONNX Runtime and OpenVINO.

    python benchmarks/charlstm.py --data DIR --out benchmarks/results/charlstm.json

Measures bits per character of the deployed sessions on the last 20 % of tinyshakespeare (windows of 256 characters,
each from a fresh state: 32 characters to warm up, the others scored), latency at batch 1 (every contestant in its own
process, interleaved round by round) and bytes on disk. Peer: `onnxruntime.quantization.quantize_dynamic(QInt8)` on our
float file. GPTQ is calibrated on the first 80 %, which the model was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from environment import describe
from tersor.core.batch import Batch
from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.signature import Signature, input_names, signature_of
from tersor.core.step import Step
from tersor.measure import Contestant, Protocol, latency, paired_ratio
from tersor.quantize import Dynamic, WeightOnly
from tersor.runtimes import Loaded, get_runtime
from tersor.runtimes.eager import TorchSession
from tersor.runtimes.parity import check_parity

SEED = 0
WINDOW, WARM_UP = 256, 32
TIMED_LENGTH = 64
CALIBRATION = 128


class CharLstm(nn.Module):
    """Tokens `[B, T]` -> logits `[B, T, 65]`, from a fresh state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 64)
        self.lstm = nn.LSTM(64, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 65)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character at every place."""
        logits: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return logits


STEPS: dict[str, tuple[str, Step | None]] = {
    "onnxruntime float32": ("onnxruntime", None),
    "tersor onnxruntime int8-dynamic": ("onnxruntime", Dynamic()),
    "tersor onnxruntime int8-weights": ("onnxruntime", WeightOnly(bits=8)),
    "tersor onnxruntime int4-weights, nearest": ("onnxruntime", WeightOnly()),
    "tersor onnxruntime int4-weights, hqq": ("onnxruntime", WeightOnly(method="hqq")),
    "tersor onnxruntime int4-weights, gptq": (
        "onnxruntime",
        WeightOnly(method="gptq", range_method="mse", samples=CALIBRATION),
    ),
    "tersor onnxruntime int4-weights, nearest, mse ranges": ("onnxruntime", WeightOnly(range_method="mse")),
    "openvino float32": ("openvino", None),
    "tersor openvino int8-dynamic": ("openvino", Dynamic()),
    "tersor openvino int4-weights, nearest": ("openvino", WeightOnly()),
}
PEER = "quantize_dynamic QInt8"
FASTEST_LEFT_OUT = ("hqq", "mse ranges")  # the same kernels as nearest


def characters(data: Path) -> Tensor:
    """The whole text as tokens, `[N]`."""
    text = (data / "text/tinyshakespeare.txt").read_text()
    place = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([place[character] for character in text])


def trained(data: Path) -> CharLstm:
    """The float model."""
    model = CharLstm()
    model.load_state_dict(load_file(data / "weights/charlstm.safetensors"))
    return frozen_copy(model)  # type: ignore[return-value]


def windows(text: Tensor, length: int, *, overlap: int = 1) -> Tensor:
    """`[N, length]`, each window starting `overlap` characters before the last one's end."""
    return text.unfold(0, length, length - overlap).contiguous()


def prepared(arguments: argparse.Namespace) -> tuple[CharLstm, tersor.Task, Tensor]:
    """The model, a task whose calibrate split is from the training text, and the windows to score."""
    text = characters(arguments.data)
    border = int(0.8 * len(text))
    every = windows(text[:border], WINDOW)
    chosen = np.random.default_rng(SEED).permutation(len(every))[:CALIBRATION]
    scored = windows(text[border:], WINDOW + 1, overlap=WARM_UP + 1)
    return trained(arguments.data), tersor.Task(calibrate=every[torch.from_numpy(chosen)]), scored


def signature(model: nn.Module, target: tersor.Target, task: tersor.Task) -> Signature:
    """The model's signature."""
    example = task.example(2)
    return signature_of(input_names(model, example), example, example.call(model), target, None)


def bits_per_character(run: Callable[[Tensor], Any], scored: Tensor, progress: str) -> dict[str, float]:
    """Mean of ``−log₂ p`` over every character after the warm-up of each window."""
    total, count = 0.0, 0
    for batch in scored.split(32):
        logits = torch.as_tensor(run(batch[:, :-1])).double()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")[:, WARM_UP:]
        total, count = total + float(losses.sum()), count + losses.numel()
    value = total / count / float(np.log(2))
    print(f"{progress}: {value:.4f} bits per character", file=sys.stderr)
    return {"bits_per_character": value, "n": count}


def with_quantize_dynamic(source: Path, out: Path) -> None:
    """The peer: the same float file through ONNX Runtime's own tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(out), weight_type=QuantType.QInt8)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark."""
    torch.set_num_threads(arguments.threads)
    model, task, scored = prepared(arguments)
    result: dict[str, Any] = {
        "benchmark": "charlstm",
        "model": "character LSTM, 2 layers of 256, tinyshakespeare",
        "environment": describe(threads=arguments.threads, seed=SEED),
        "protocol": f"windows of {WINDOW}, {WARM_UP} characters warm up; latency: batch 1, {TIMED_LENGTH} characters",
        "contestants": {},
    }
    eager = tersor.Target("eager", threads=arguments.threads, dynamic={"tokens": {1: "time"}})
    contestants = {
        "pytorch eager float32": Contestant(partial(TorchSession, model, signature(model, eager, task), eager))
    }
    with tempfile.TemporaryDirectory() as path:
        scratch = Path(path)
        for name, (runtime, step) in STEPS.items():
            target = tersor.Target(runtime, threads=arguments.threads, dynamic={"tokens": {1: "time"}})
            started = time.perf_counter()
            candidate = Candidate(model)
            if step is not None:
                candidate = step.apply(candidate, Context(task, target, model, SEED))
            quantized, directory, found = time.perf_counter(), scratch / name, signature(model, target, task)
            directory.mkdir()
            files = get_runtime(runtime).export(candidate, task.example(2), directory, signature=found, target=target)
            exported = time.perf_counter()
            loaded = Loaded(get_runtime(runtime), directory, found, target)
            contestants[name] = Contestant(loaded, (runtime,))
            result["contestants"][name] = {
                "size_bytes": sum(file.stat().st_size for file in files),
                "quantize_seconds": quantized - started,
                "export_seconds": exported - quantized,
                "parity": check_parity(loaded, candidate, task.example),
                "notes": [note for record in candidate.history for note in record.notes],
            }
        peer = scratch / PEER
        peer.mkdir()
        with_quantize_dynamic(scratch / "onnxruntime float32/model.onnx", peer / "model.onnx")
        target = tersor.Target("onnxruntime", threads=arguments.threads, dynamic={"tokens": {1: "time"}})
        loaded = Loaded(get_runtime("onnxruntime"), peer, signature(model, target, task), target)
        contestants[PEER] = Contestant(loaded, ("onnxruntime",))
        result["contestants"][PEER] = {"size_bytes": (peer / "model.onnx").stat().st_size}
        before = bits_per_character(contestants["pytorch eager float32"].factory(), scored, "pytorch eager float32")
        result["contestants"]["pytorch eager float32"] = before
        for name in [*STEPS, PEER]:
            after = bits_per_character(contestants[name].factory(), scored, name)
            loss = after["bits_per_character"] - before["bits_per_character"]
            result["contestants"][name] |= {**after, "loss_bits_per_character": loss}
        timed = {name: made for name, made in contestants.items() if not name.endswith(FASTEST_LEFT_OUT)}
        measured = latency(
            timed,
            Batch((scored[:1, :TIMED_LENGTH].contiguous(),), {}, None),
            threads=arguments.threads,
            protocol=Protocol(rounds=arguments.rounds, round_seconds=0.4, warmup_calls=20),
            progress=lambda done, total: print(f"round {done} of {total}", file=sys.stderr),
        )
        times = {name: found.latency for name, found in measured.items()}
        for name, found in times.items():
            result["contestants"][name]["latency_ms"] = found.model_dump(exclude={"histogram"})
        result["time_ratio"] = {
            f"{ours} / {theirs}": paired_ratio(times[ours], times[theirs])
            for ours, theirs in (
                ("tersor onnxruntime int8-dynamic", PEER),
                ("tersor onnxruntime int8-dynamic", "onnxruntime float32"),
                ("tersor onnxruntime int4-weights, nearest", "onnxruntime float32"),
                ("tersor openvino int8-dynamic", "openvino float32"),
                ("tersor openvino int4-weights, nearest", "openvino float32"),
            )
        }
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/charlstm.json")
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(run(arguments), indent=2) + "\n")


if __name__ == "__main__":
    main()
