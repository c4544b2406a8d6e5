"""How much memory and time post-training quantization of Transformers takes.

    python benchmarks/quantize_memory.py --out benchmarks/results/quantize_memory.json

Each row runs in a process of its own: a BERT of 12 layers with random weights, 32 examples of 64 tokens, in batches of
8. Memory: the highest resident size while quantizing, over the size before, per byte of the model - the model itself
not counted, its quantized copy counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from coupling_speed import HEADS, INNER, VOCABULARY, WIDTH, Peak, resident
from environment import describe
from tersor.hf import SequenceClassifier
from tersor.quantize import dynamic, static, weight_only

LAYERS, EXAMPLES, TOKENS, BATCH = 12, 32, 64, 8
ROWS: dict[str, Any] = {
    "static int8": lambda model, data: static(model, data, batch_size=BATCH),
    "static int8, means corrected": lambda model, data: static(model, data, batch_size=BATCH, correction="mean"),
    "static W4A8 by GPTQ": lambda model, data: static(model, data, batch_size=BATCH, weight_bits=4, rounding="gptq"),
    "dynamic int8": lambda model, data: dynamic(model, data),
    "weight-only int4": lambda model, data: weight_only(model, data),
}


def bert(layers: int, width: int, inner: int, heads: int) -> SequenceClassifier:
    """With random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    return SequenceClassifier(BertForSequenceClassification(config)).eval()


def tokens() -> dict[str, torch.Tensor]:
    """Random words without padding."""
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(name: str, threads: int) -> dict[str, float]:
    """One row, in this process."""
    torch.set_num_threads(threads)
    ROWS[name](bert(1, 32, 64, 2), tokens())  # loads what is loaded once
    model, data = bert(LAYERS, WIDTH, INNER, HEADS), tokens()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before, peak, started = resident(), Peak(), time.perf_counter()
    peak.start()
    found = ROWS[name](model, data)
    seconds = time.perf_counter() - started
    peak.stopped.set()
    peak.join()
    return {
        "parameters": size // 4,
        "coverage": found.coverage,
        "seconds": seconds,
        "peak_over_model": (peak.highest - before) / size,
    }


def main() -> None:
    """Runs all rows, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/quantize_memory.json")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.threads)))
        return
    result: dict[str, Any] = {"environment": describe(threads=arguments.threads, seed=0, packages=("transformers",))}
    result["rows"] = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name, "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our script
        result["rows"][name] = json.loads(done.stdout.splitlines()[-1])
        print(name, result["rows"][name], file=sys.stderr)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
