"""The CIFAR-10 example on real weights and images: small, covered, and certified at one point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tersor

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def out(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example, run as its first lines say, left ResNet-20."""
    place = tmp_path_factory.mktemp("cifar") / "out"
    options = {"data": shared_data, "depth": 20, "target": "onnxruntime", "out": place, "threads": 1, "rounds": 1}
    command = [sys.executable, "examples/cifar_resnet.py"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "ertified" in done.stdout
    assert str(place / "onnxruntime" / "artifact") in done.stdout
    return place / "onnxruntime"


@pytest.fixture
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "artifact" / "report.json").read_text())
    return found


def test_it_is_certified_at_one_point(report: dict[str, Any]) -> None:
    certificate = report["certificate"]
    assert report["verdict"] == "certified"
    assert certificate["certified"]
    assert (certificate["n"], certificate["max_drop"], certificate["confidence"]) == (6000, 0.01, 0.95)
    assert (certificate["method"], certificate["times_asked"]) == ("exact-paired", 1)
    assert certificate["drop"] < certificate["upper_bound"] <= 0.01


def test_it_is_a_third_of_the_size_and_all_in_int8(report: dict[str, Any]) -> None:
    assert report["ratios"]["size"] >= 3
    assert report["coverage"]["macs_quantized"] > 0.99
    assert report["coverage"]["parameters_quantized"] > 0.95
    assert report["deployed"]["precision"] == "int8"


def test_it_is_still_a_good_network(report: dict[str, Any]) -> None:
    assert report["baseline"]["metric"] > 0.86
    assert report["deployed"]["metric"] > report["baseline"]["metric"] - 0.01
    assert report["changes"]["n"] == 2000
    assert [row["name"] for row in report["changes"]["per_class"]][:2] == ["airplane", "automobile"]
    assert report["baseline"]["macs"] == report["deployed"]["macs"] == pytest.approx(40.6e6, rel=0.02)


def test_the_artifact_is_whole(out: Path) -> None:
    session = tersor.load(out / "artifact")
    assert session.signature.inputs[0].shape == ["batch", 3, 32, 32]
