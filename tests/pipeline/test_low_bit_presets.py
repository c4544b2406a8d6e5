"""The presets that quantize in other ways than to static int8, from model to artifact and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tersor

BYTES = {"float16": 0.62, "int4-static": 0.35, "int4-weights": 0.45, "int8-dynamic": 1.05}  # of the float file


@pytest.mark.parametrize("recipe", BYTES)
def test_a_preset_is_deployed_measured_and_certified(
    recipe: str, deployed: Callable[[str, str], tersor.Result], problem: object
) -> None:
    result = deployed("onnxruntime", recipe)
    report = result.report
    assert result.certified, report.certificate
    assert report.verdict == "certified"
    assert report.deployed.size_bytes < BYTES[recipe] * report.runtime_baseline.size_bytes
    assert 0 < report.coverage.parameters_quantized <= 1
    computes = recipe in {"int4-static", "int8-dynamic"}
    assert (report.coverage.macs_quantized > 0) == computes
    session = tersor.load(result.artifact)
    images = problem.images()[0][:7]  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = result.model(images)
    assert torch.equal(session(images).argmax(1), expected.argmax(1))
