"""The tiny models, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf import tiny


class Saved(NamedTuple):
    """A directory, what was saved there, and a weights file beside it."""

    directory: Path
    model: Any
    head: Any = None
    weights: Path | None = None


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint with a head of its own, three named classes."""
    directory = tmp_path_factory.mktemp("classifier")
    return Saved(directory, tiny.save_classifier(directory))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A plain encoder, and its classification weights in a file."""
    place = tmp_path_factory.mktemp("encoder")
    weights = place / "weights.safetensors"
    model, head = tiny.save_encoder(place / "model", weights)
    return Saved(place / "model", model, head, weights)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sentences of two classes: 60 to train, 120 to certify, 40 to report."""
    place = tmp_path_factory.mktemp("sentences")
    for seed, (role, count) in enumerate({"train": 60, "certify": 120, "report": 40}.items()):
        tiny.write_sentences(place / f"{role}.tsv", count, labels=2, seed=seed)
    return {role: place / f"{role}.tsv" for role in ("train", "certify", "report")}
