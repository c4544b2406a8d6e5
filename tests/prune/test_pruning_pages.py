from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tersor.prune import criteria
from tersor.recipes import parse_recipe

PAGES = Path(__file__).resolve().parents[2] / "docs/methods"
NAMES = ["prune-depth.md", "prune-experts.md", "prune-structured.md", "prune-unstructured.md", "sparsity-patterns.md"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (PAGES / name).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_run(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        script = "\n".join(blocks(name, "python"))
        assert script
        exec(compile(script, name, "exec"), {})  # noqa: S102 - our own pages


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_parse(name: str) -> None:
    for text in blocks(name, "yaml"):
        assert parse_recipe(text).steps


def test_every_criterion_is_named() -> None:
    page = (PAGES / "prune-unstructured.md").read_text()
    assert [name for name in criteria.__all__ if f"`{name}`" not in page] == []
