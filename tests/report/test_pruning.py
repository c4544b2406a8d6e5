"""What page and card say about structured pruning, and the picture of what goes together."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from torch import nn

from report.test_report import HOSTILE, Page, a_report
from tersor.core.report import FrozenPart, PrunedFamily, Pruning, Report, StepRecord
from tersor.graph import couple
from tersor.report import draw_coupling, render_card, render_html
from tersor.report.coupling import ROWS_SHOWN, coupling_plot
from tersor.report.pruning import reasons


def a_pruning(families: int = 5, layers: int = 12, **changed: Any) -> Pruning:
    """A network in which every family touches four layers."""
    names = [f"stage{number // 10}.{number % 10}.conv" for number in range(layers)]
    cut = [
        PrunedFamily(
            name=f"{names[number * layers // families]}.weight[0]", kind="channel", units=64 + number, kept=40,
            layers=[names[(number * layers // families + 3 * step) % layers] for step in range(4)],
        )
        for number in range(families)
    ]  # fmt: skip
    frozen = [FrozenPart(name=f"{name}.weight[1]", reason="it meets a fixed dimension") for name in names[:7]]
    fields = {
        "parameters_before": 1_000_000, "parameters_after": 400_000, "macs_before": 10**9, "macs_after": 3 * 10**8,
        "amount": 0.375, "coverage": 0.92, "families": cut, "max_error": 3.1e-7, "layers": names,
        "frozen": [*frozen, FrozenPart(name="head.weight[0]", reason="it is an output of the model")],
    }  # fmt: skip
    return Pruning(**(fields | changed))


def pruned_report(*prunings: Pruning) -> Report:
    return a_report(
        history=[StepRecord(name="prune.structured", settings={}, seconds=1.0, pruning=item) for item in prunings]
    )


def drawing(pruning: Pruning) -> ElementTree.Element:
    return ElementTree.fromstring(str(coupling_plot(pruning)))  # noqa: S314 - our own drawing


def cells(row: ElementTree.Element, colour: str = "deployed") -> list[ElementTree.Element]:
    return [part for part in row.findall("rect") if f"--{colour}," in part.attrib["style"]]


def test_the_page_shows_numbers_families_and_reasons() -> None:
    page = Page(render_html(pruned_report(a_pruning())))
    for part in (
        "1.00 M → 400 k", "60.0 % removed", "1.00 G → 300 M", "37.5 %", "92.0 %", "stage0.2.conv.weight[0]",
        "Verified: the model without these units answers like the whole model with them masked",
        "8 parts frozen", "it is an output of the model", "and 4 more",
    ):  # fmt: skip
        assert part in page.words, part
    assert page.open == []
    assert ("id", "pruning") in page.attributes
    assert ("href", "#pruning") in page.attributes


def test_a_run_without_pruning_says_nothing_of_it() -> None:
    html = render_html(a_report())
    assert 'id="pruning"' not in html
    assert "## Pruning" not in render_card(a_report(), files={})


def test_two_prunings_are_told_apart() -> None:
    words = Page(render_html(pruned_report(a_pruning(), a_pruning(3, max_error=None)))).words
    assert "prune.structured, 1 of 2" in words
    assert "Not verified against the masked model." in words


def test_many_families_collapse() -> None:
    page = Page(render_html(pruned_report(a_pruning(150, 400))))
    assert "The 15 families that lost most units, of 150" in page.words
    assert "Show all 150 families" in page.words
    assert f"The first {ROWS_SHOWN} families of 150." in page.words


def test_the_card_shows_numbers_families_and_reasons() -> None:
    card = render_card(pruned_report(a_pruning(30, 60)), files={"model.onnx": "00"})
    assert "parameters 1.00 M → 400 k, MACs 1.00 G → 300 M; 37.5 % of the units of 30 families" in card
    assert card.count("| channel |") == 10
    assert "and 20 more, in report.html" in card
    assert "- head.weight\\[0\\]: it is an output of the model" in card
    assert "<" not in card[card.index("## Pruning") : card.index("## Load it")]


@pytest.mark.parametrize(("runtime", "said"), [("eager", "model=build"), ("onnxruntime", 'tersor.load(".")')])
def test_the_card_says_how_the_runtime_loads(runtime: str, said: str) -> None:
    report = pruned_report(a_pruning())
    deployed = report.deployed.model_copy(update={"runtime": runtime})
    assert said in render_card(report.model_copy(update={"deployed": deployed}), files={})


def test_equal_reasons_are_one_line_most_frequent_first() -> None:
    found = reasons(a_pruning())
    assert [(item.reason, item.places) for item in found] == [
        ("it meets a fixed dimension", 7),
        ("it is an output of the model", 1),
    ]
    assert found[0].names.endswith("and 4 more")


def test_a_row_for_every_family_and_a_cell_for_every_layer() -> None:
    pruning = a_pruning()
    rows = drawing(pruning).findall("g")
    assert len(rows) == len(pruning.families) + 1
    width = 0.0
    for row, family in zip(rows, pruning.families, strict=False):
        *touched, bar = cells(row)
        assert len(touched) == len(set(family.layers)) == 4
        told = row.findtext("title")
        assert told == f"{family.name}: {family.kept} of {family.units} channels stay; touches 4 layers"
        whole = next(part for part in row.findall("rect")[::-1] if part is not bar)
        assert float(bar.attrib["width"]) / float(whole.attrib["width"]) == pytest.approx(40 / family.units, abs=1e-3)
        columns = [float(part.attrib["x"]) - float(touched[0].attrib["x"]) for part in touched]
        width = width or columns[1] / 3
        order = [pruning.layers.index(layer) for layer in sorted(family.layers, key=pruning.layers.index)]
        assert columns == pytest.approx([width * (number - order[0]) for number in order], abs=0.1)
    assert len(cells(rows[-1], "eager")) == 7  # frozen; the head is no column here
    labels = [part.text for part in drawing(pruning).findall("text")]
    assert labels == pruning.layers


def test_a_hundred_families_stay_readable() -> None:
    picture = drawing(a_pruning(100, 300))
    rows = picture.findall("g")
    assert len(rows) == 101
    heights = sorted({float(row.findall("text")[0].attrib["y"]) for row in rows})
    assert min(later - earlier for earlier, later in itertools.pairwise(heights)) >= 10  # no overlap
    sizes = {float(size) for size in re.findall(r"font-size:([\d.]+)px", str(coupling_plot(a_pruning(100, 300))))}
    assert min(sizes) >= 9
    assert [part.text for part in picture.findall("text")] == ["300 layers, in the order of the model →"]
    assert len(str(coupling_plot(a_pruning(100, 300)))) < 150_000
    assert len(drawing(a_pruning(500, 900)).findall("g")) == ROWS_SHOWN + 1


def test_neighbouring_cells_of_a_wide_network_are_one() -> None:
    names = [f"layer{number}" for number in range(60)]
    family = PrunedFamily(name="layer0.weight[0]", kind="width", units=8, kept=4, layers=names)
    pruning = a_pruning().model_copy(update={"families": [family], "layers": names, "frozen": []})
    (row,) = drawing(pruning).findall("g")
    *touched, _ = cells(row)
    assert len(touched) == 1


def test_nothing_to_draw_is_nothing() -> None:
    assert coupling_plot(a_pruning().model_copy(update={"families": []})) is None


def test_hostile_names_stay_text() -> None:
    family = PrunedFamily(name=HOSTILE, kind=HOSTILE, units=3, kept=2, layers=[HOSTILE])
    pruning = a_pruning().model_copy(
        update={"families": [family], "layers": [HOSTILE], "frozen": [FrozenPart(name=HOSTILE, reason=HOSTILE)]}
    )
    report = pruned_report(pruning)
    page, harmless = Page(render_html(report)), Page(render_html(pruned_report(a_pruning())))
    assert page.open == []
    assert set(page.tags) <= set(harmless.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in render_html(report)
    card = render_card(report, files={})
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card)
    assert not [token for token in tokens if token.type == "html_block"]
    assert {child.type for token in tokens for child in token.children or []} <= {
        "text", "softbreak", "strong_open", "strong_close", "text_special",
    }  # fmt: skip


def test_a_coupling_can_be_drawn_by_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    coupling = couple(model, torch.zeros(2, 4))
    picture = str(draw_coupling(coupling))
    root = ElementTree.fromstring(picture)  # noqa: S314 - our own drawing
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "0.weight[0]" in picture
    assert "var(--deployed,#" in picture  # has its colours outside of the page as well
    assert draw_coupling(couple(nn.ReLU(), torch.zeros(2, 4))) is None


def test_the_record_survives_json() -> None:
    report = pruned_report(a_pruning())
    assert Report.model_validate_json(report.model_dump_json()) == report
    before = report.model_dump(mode="json")
    del before["history"][0]["pruning"]  # reports of older versions
    assert Report(**before).history[0].pruning is None
