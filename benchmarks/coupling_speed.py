"""How long coupling and surgery take, and how much memory, for Transformers of four sizes.

    python benchmarks/coupling_speed.py --out benchmarks/results/coupling_speed.json

Each repetition runs in a process of its own. Time: finding the families and cutting half of each; verification is
timed beside it. Memory: the highest resident size while coupling and cutting, over the size before, per byte of
the model - the model itself not counted, its smaller copy counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from environment import describe
from tersor.prune import structured

SIZES = {"2 layers": 2, "4 layers": 4, "8 layers": 8, "12 layers": 12}
WIDTH, INNER, HEADS, VOCABULARY = 768, 3072, 12, 20_000
REPETITIONS = 3


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the memory of a process in /proc")


class Peak(threading.Thread):
    """Watches the resident size."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.stopped = 0, threading.Event()

    def run(self) -> None:
        """Samples until stopped."""
        while not self.stopped.wait(0.002):
            self.highest = max(self.highest, resident())


def measure(layers: int, threads: int, *, verify: bool) -> dict[str, float]:
    """One repetition in this process."""
    torch.set_num_threads(threads)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=128,
    )
    tiny = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    tokens = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(0))
    structured(tiny.eval(), tokens, verify="off")  # loads what is loaded once
    model = BertForSequenceClassification(config).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before, peak = resident(), Peak()
    peak.start()
    report = structured(model, tokens, amount=0.5, verify="full" if verify else "off")
    peak.stopped.set()
    peak.join()
    return {
        "parameters": report.params_before,
        "parameters_after": report.params_after,
        "families": len(report.families),
        "coupling_s": report.seconds["coupling"],
        "surgery_s": report.seconds["surgery"] + report.seconds["scoring"],
        "verification_s": report.seconds.get("verification", 0.0),
        "extra_memory_per_model_byte": (peak.highest - before) / size,
    }


def separately(layers: int, threads: int, *, verify: bool) -> dict[str, float]:
    """One repetition in a fresh process."""
    command = [sys.executable, __file__, "--layers", str(layers), "--threads", str(threads)]
    command += ["--verify"] if verify else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own script
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """All sizes, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, help="one repetition of this size, printed as JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    if options.layers is not None:
        print(json.dumps(measure(options.layers, options.threads, verify=options.verify)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIZES}
    for _ in range(REPETITIONS):
        for name, layers in SIZES.items():
            runs[name].append(separately(layers, options.threads, verify=False))
            print(name, runs[name][-1], flush=True)
    rows: list[dict[str, Any]] = []
    for name, layers in SIZES.items():
        row: dict[str, Any] = {"name": name, "n": REPETITIONS}
        for key in runs[name][0]:
            values = [run[key] for run in runs[name]]
            row[key] = statistics.median(values)
            row[f"{key}_spread"] = [min(values), max(values)]
        row.pop("verification_s_spread")  # it was off in these runs; one run with it follows
        row["verification_s"] = separately(layers, options.threads, verify=True)["verification_s"]
        rows.append(row)
    result = {"environment": describe(threads=options.threads, seed=0, packages=("transformers",)), "rows": rows}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
