"""What the tables share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def result_of(name: str) -> dict[str, Any]:
    """A benchmark's results."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def drop_of(row: dict[str, Any], prefix: str) -> str:
    """A drop in points with its interval."""
    low, high = row[f"{prefix}_interval_points"]
    return f"{row[f'{prefix}_drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]"
