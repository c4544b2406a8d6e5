from __future__ import annotations

import pytest

from tersor.core.target import Target
from tersor.graph.rules import TRANSPOSED
from tersor.quantize import styles
from tersor.quantize.styles import Style, style_for


@pytest.mark.parametrize("reduce", [True, False])
def test_what_each_runtime_wants(reduce: bool) -> None:
    def style(runtime: str) -> Style:
        return style_for(Target(runtime, reduce_range=reduce))

    assert style("openvino") == Style(signed_products=True, reduced_weights=reduce)
    assert style("onnxruntime") == Style(reduced_weights=reduce, without_kernel=TRANSPOSED)
    assert style("eager") == style("inductor") == Style(reduced_weights=reduce)


@pytest.mark.parametrize("overflows", [True, False])
def test_the_processor_decides_where_the_target_does_not(overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(styles, "saturates_int8", lambda: overflows)
    assert style_for(Target("onnxruntime")).reduced_weights == overflows
    assert style_for(Target("openvino", reduce_range=not overflows)).reduced_weights != overflows
