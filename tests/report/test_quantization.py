"""What the page says about widths, and the picture of them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

from report.test_report import HOSTILE, Page, a_report
from tersor.core.report import QuantizationRecord, QuantizedLayer, Report, StepRecord
from tersor.report import render_html
from tersor.report.quantization import LAYERS_DRAWN, ranked, widths_plot


def a_record(layers: int = 12) -> QuantizationRecord:
    rows = [
        QuantizedLayer(
            name=f"stage{number // 4}.{number}.conv", parameters=1000, macs=10**6, activation_bits=8,
            weight_bits=(2, 4, 8, 32)[number % 4], losses=[10.0 ** (-number % 5), 1e-3, 1e-6],
        )
        for number in range(layers)
    ]  # fmt: skip
    return QuantizationRecord(measure="KL divergence", widths=[2, 4, 8], layers=rows)


def report_of(*records: QuantizationRecord) -> Report:
    return a_report(
        history=[StepRecord(name="quantize.mixed", settings={}, seconds=1.0, quantization=item) for item in records]
    )


def test_the_page_draws_and_lists_every_layer() -> None:
    page = Page(render_html(report_of(a_record())))
    assert ("id", "widths") in page.attributes
    assert ("href", "#widths") in page.attributes
    assert page.open == []
    for part in ("11.5 bits per weight on average over 12 layers", "KL divergence if this layer alone is rounded"):
        assert part in page.words, part
    assert page.words.count("stage1.5.conv") == 2  # drawn and listed
    assert "Loss at 4" in page.words


def test_a_run_without_choices_says_nothing_of_them() -> None:
    assert 'id="widths"' not in render_html(a_report())


def test_bars_are_as_long_as_the_widths() -> None:
    record = a_record(4)
    text = str(widths_plot(record))
    root = ElementTree.fromstring(re.sub(r"xlink:href", "href", text))  # noqa: S314 - our own drawing
    words = ["".join(part.itertext()).strip() for part in root.iter() if part.tag.endswith("text")]
    for word in ("bits", "lost at 2 bits", "2", "4", "8", "float", "stage0.0.conv"):
        assert word in words
    assert [word for word in words if word.startswith("stage")] == [layer.name for layer in ranked(record)]
    assert "var(--deployed)" in text


def test_layers_that_were_not_measured_come_last_and_have_no_loss() -> None:
    table = QuantizedLayer(name="embedding", parameters=100, macs=0, weight_bits=8)
    record = a_record(2).model_copy(update={"layers": [table, *a_record(2).layers]})
    assert ranked(record)[-1] is table
    assert widths_plot(record) is not None
    plain = QuantizationRecord(layers=[table])  # nothing was measured at all
    page = Page(render_html(report_of(plain)))
    assert "8.00 bits per weight on average over 1 layers" in page.words
    assert "Sensitivity" not in page.words
    assert "most sensitive" not in page.words
    assert "In the order of the model." in page.words


def test_hundreds_of_layers_and_impossible_losses_are_drawn() -> None:
    record = a_record(200)
    odd = record.layers[0].model_copy(update={"losses": [math.inf, 0.0, 0.0]})
    silent = record.layers[1].model_copy(update={"losses": [0.0, 0.0, 0.0]})
    record = record.model_copy(update={"layers": [odd, silent, *record.layers[2:]]})
    page = Page(render_html(report_of(record)))
    assert f"The first {LAYERS_DRAWN} of 200." in page.words
    assert widths_plot(QuantizationRecord(layers=[])) is None


def test_hostile_names_stay_text() -> None:
    layer = a_record(1).layers[0].model_copy(update={"name": HOSTILE})
    report = report_of(QuantizationRecord(measure=HOSTILE, widths=[2, 4, 8], layers=[layer]))
    page, harmless = Page(render_html(report)), Page(render_html(report_of(a_record(1))))
    assert page.open == []
    assert set(page.tags) <= set(harmless.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in render_html(report)


def test_the_record_survives_json_and_older_reports_have_none() -> None:
    report = report_of(a_record())
    assert Report.model_validate_json(report.model_dump_json()) == report
    before = report.model_dump(mode="json")
    del before["history"][0]["quantization"]
    assert Report(**before).history[0].quantization is None
