"""Attached files through a whole run: copied, hashed, listed in the card, guarded against changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tersor
from tersor.core.artifact import verify
from tersor.errors import IntegrityError


@pytest.mark.usefixtures("quick_latency")
def test_attached_files_are_part_of_the_artifact(problem: Any, tmp_path: Path) -> None:
    words, other = tmp_path / "words.txt", tmp_path / "other.onnx"
    words.write_text("one two\n")
    other.write_bytes(b"no model")
    task = problem.small_task(attachments={"assets/words.txt": words, "assets/deep/other.onnx": other})
    result = tersor.compress(
        problem.model(),
        task,
        out=tmp_path / "run",
        budget=tersor.Budget(max_drop=0.05, rounds=1),
        target=tersor.Target("onnxruntime", threads=1),
        recipe="convert",
    )
    copied = result.artifact / "assets" / "words.txt"
    assert copied.read_text() == words.read_text()
    manifest = verify(result.artifact)
    assert {"assets/words.txt", "assets/deep/other.onnx", "model.onnx"} <= set(manifest.files)
    card = (result.artifact / "README.md").read_text()
    assert manifest.files["assets/words.txt"].sha256[:16] in card
    assert 'InferenceSession("assets' not in card
    assert tersor.load(result.artifact)(problem.images()[0][:2]).shape == (2, 4)
    copied.write_text("three\n")
    with pytest.raises(IntegrityError, match=r"words\.txt"):
        tersor.load(result.artifact)
