from __future__ import annotations

import runpy
from pathlib import Path

import tersor

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "distill_digits.py"


def test_a_student_of_digits_is_taught_and_deployed(tmp_path: Path, quick_latency: None) -> None:
    found = runpy.run_path(str(EXAMPLE))["run"](tmp_path)
    assert found["teacher"] > 0.95
    assert found["student taught"] > 0.85
    assert tersor.load(tmp_path / "deployed" / "artifact") is not None
    assert (tmp_path / "distilled" / "answers").is_dir()
