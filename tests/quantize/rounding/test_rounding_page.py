from __future__ import annotations

import re
from pathlib import Path

from tersor.quantize import rounding

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/methods/weight-rounding.md").read_text()


def test_the_examples_run() -> None:
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    assert script
    exec(compile(script, "weight-rounding.md", "exec"), {})  # noqa: S102 - our own page


def test_every_method_is_named_and_links_its_paper() -> None:
    assert [name for name in rounding.__all__ if name not in PAGE] == []
    for path in (ROOT / "src/tersor/quantize/rounding").glob("[!_]*.py"):
        links = re.findall(r"https://[^\s,;)]+[^\s,;).]", path.read_text())
        assert path.stem == "base" or links
        assert [link for link in links[:1] if link not in PAGE] == []
