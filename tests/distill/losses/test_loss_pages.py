from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tersor.distill.losses import LOSSES, settings_of

PAGES = Path(__file__).resolve().parents[3] / "docs/methods"


@pytest.mark.parametrize("on", ["outputs", "features"])
def test_the_examples_run(on: str) -> None:
    page = (PAGES / f"distill-{on}.md").read_text()
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert script
    with torch.random.fork_rng(devices=[]):
        exec(compile(script, on, "exec"), {})  # noqa: S102 - our own pages


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_and_setting_is_told(name: str) -> None:
    page = (PAGES / f"distill-{LOSSES[name].on}.md").read_text()
    assert f"\n| `{name}` |" in page
    assert [setting for setting in settings_of(name) if f"`{setting}`" not in page] == []
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    assert ("**Needs labels**" in row) == LOSSES[name].needs_labels
    assert ("**Has weights**" in row) == LOSSES[name].trainable
