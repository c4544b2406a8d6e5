"""From a directory to an artifact: the session's logits are those of transformers, the tokenizer comes out again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tersor
from tersor import hf
from tersor.core.artifact import verify
from tersor.hf.text import read_tsv

TEXTS = ["w1 w2 w3", "w7 w6 w5 w4 w3 w2 w1 w11 w12 w13 w14", "w21"]


@pytest.fixture(scope="module")
def artifact(
    classifier: Any,
    encoder: Any,
    files: dict[str, Path],
    untimed: Callable[[], AbstractContextManager[None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """`artifact("classifier", "onnxruntime")`, each made once."""

    @cache
    def run(kind: str, runtime: str) -> Path:
        saved = {"classifier": classifier, "encoder": encoder}[kind]
        with untimed():
            result = tersor.compress(
                hf.load_model(saved.directory, saved.weights),
                hf.text_task(saved.directory, **files, max_length=30),
                out=tmp_path_factory.mktemp(kind) / "run",
                budget=tersor.Budget(max_drop=0.1, rounds=1),
                target=tersor.Target(runtime, threads=1, dynamic=hf.DYNAMIC),
                recipe="convert",
            )
        assert result.certified
        return result.artifact

    return run


def tokens(place: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(str(place / "tokenizer"), local_files_only=True)
    made = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "eager"])
def test_the_session_answers_like_transformers(
    classifier: Any, artifact: Callable[[str, str], Path], runtime: str
) -> None:
    place = artifact("classifier", runtime)
    build = (lambda: hf.load_model(classifier.directory)) if runtime == "eager" else None
    session, inputs = tersor.load(place, model=build), tokens(place)
    with torch.no_grad():
        expected = classifier.model(**inputs).logits
    torch.testing.assert_close(session(**inputs), expected, rtol=0, atol=1e-3)
    for row, text in enumerate(TEXTS):  # other sizes of both dynamic dimensions
        length = len(text.split()) + 2
        alone = session(**{name: value[row : row + 1, :length] for name, value in inputs.items()})
        torch.testing.assert_close(alone[0], expected[row], rtol=0, atol=1e-3)
    assert [spec.shape for spec in session.signature.inputs] == [["batch", "tokens"]] * 2


def test_an_encoder_with_a_head_is_deployed_likewise(encoder: Any, artifact: Callable[[str, str], Path]) -> None:
    place = artifact("encoder", "onnxruntime")
    model, inputs = hf.load_model(encoder.directory, encoder.weights), tokens(place)
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(tersor.load(place)(**inputs), expected, rtol=0, atol=1e-3)


def test_the_tokenizer_comes_out_as_it_went_in(
    classifier: Any, files: dict[str, Path], artifact: Callable[[str, str], Path]
) -> None:
    place = artifact("classifier", "onnxruntime")
    before = AutoTokenizer.from_pretrained(str(classifier.directory), local_files_only=True)
    after = AutoTokenizer.from_pretrained(str(place / "tokenizer"), local_files_only=True)
    texts = read_tsv(files["train"]).texts
    assert after(texts)["input_ids"] == before(texts)["input_ids"]
    assert after.get_vocab() == before.get_vocab()


def test_the_manifest_and_the_card_know_the_tokenizer(artifact: Callable[[str, str], Path]) -> None:
    place = artifact("classifier", "onnxruntime")
    manifest, card = verify(place), (place / "README.md").read_text()
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"} <= set(manifest.files)
    assert "AutoTokenizer" in manifest.preprocessing
    assert manifest.class_names == ["bad", "fair", "good"]
    assert "cut to 30 tokens" in card
    assert manifest.files["tokenizer/tokenizer.json"].sha256[:16] in card
    assert not list(place.glob("tokenizer/*.safetensors"))


def test_the_artifact_needs_no_transformers(artifact: Callable[[str, str], Path], fresh_process: Any) -> None:
    place = artifact("classifier", "onnxruntime")
    script = (
        "import sys, numpy as np, tersor\nsession = tersor.load(sys.argv[1])\n"
        "ids = np.full((2, 5), 7)\nprint(session(input_ids=ids, attention_mask=np.ones_like(ids)).shape)\n"
        "assert 'transformers' not in sys.modules"
    )
    assert fresh_process(script, place).stdout.strip() == "(2, 3)"
