from __future__ import annotations

import re
from pathlib import Path

from tersor import quantize
from tersor.quantize import formats, ranges

PAGE = (Path(__file__).resolve().parents[3] / "docs/methods/number-formats.md").read_text()


def test_the_examples_run() -> None:
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    assert script
    exec(compile(script, "number-formats.md", "exec"), {})  # noqa: S102 - our own page


def test_every_format_and_range_is_named() -> None:
    assert set(formats.__all__) <= set(quantize.__all__)
    names = [*formats.__all__, *ranges.__all__]
    assert [name for name in names if f"`{name}`" not in PAGE and name != "Quantized"] == []
