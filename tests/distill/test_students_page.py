from __future__ import annotations

import re
from pathlib import Path

import torch

from tersor.distill.sequences import Generation

PAGE = Path(__file__).resolve().parents[2] / "docs/methods/students.md"


def test_the_examples_run() -> None:
    scripts = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(scripts) == 4
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(scripts), PAGE.name, "exec"), names)  # noqa: S102 - our own page
    assert names["student"].layers == {"": (1, 3, 5, 8, 10, 12)}  # type: ignore[attr-defined]
    assert names["tokens"].shape == (8, 15)  # type: ignore[attr-defined]


def test_every_setting_of_generation_is_named() -> None:
    page = PAGE.read_text()
    assert [
        name for name in Generation.model_fields if name not in ("seed", "batch_size") and f"`{name}`" not in page
    ] == []
