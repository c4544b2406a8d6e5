"""The page, the card and the terminal about a search: complete, escaped, drawn from the record alone."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from statistics import median

import pytest

from report.test_report import HOSTILE, Page, a_certificate, a_report, bare_report, terminal
from tersor.core import search as core
from tersor.core.report import Report
from tersor.report import render_card, render_html, search
from tersor.report.search import Found
from tersor.report.search_maps import ROWS_DRAWN, costs_plot, damages_plot
from tersor.report.search_plots import drops_plot, front_plot, history_plot, latencies_plot
from tersor.search.front import front

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (1, 2)]
WIDTHS = {f"layer{stage}.{block}.conv1.weight[0]": 32 << stage for stage in (1, 2, 3, 4) for block in (0, 1)}
FRONT = [12, 11, 17, 16, 19, 18, 14, 3, 1, 2, 0]
REASONS = {4: ("timeout", "after 312 s, 300 s were left"), 9: ("out of memory", "3.1 GB of 3.0 GB"),
           13: ("not finite", "the loss became NaN in step 212")}  # fmt: skip


def choice_of(strength: int, format: str = "int8") -> core.Choice:
    """The stronger, the more blocks go and the fewer units stay."""
    widths = {name: size - size * strength // 16 for name, size in WIDTHS.items()} if strength else {}
    return core.Choice(skipped=tuple(BLOCKS[: strength // 3]), widths=widths, format=format)


def some_trials() -> list[core.TrialRecord]:
    """Twenty trials: three formats whole, a sweep with short trainings, few with longer ones; three failed."""
    plan = [(0, 0, "float32"), (0, 0, "int8"), (0, 0, "int8-dynamic")]
    plan += [(strength, 0, "int8") for strength in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    plan += [(strength, 1, "int8") for strength in (3, 5, 6, 8)] + [(5, 2, "int8"), (6, 2, "int8")]
    trials = []
    for number, (strength, rung, format) in enumerate(plan):
        whole = {"float32": 6.2, "int8": 4.1, "int8-dynamic": 5.6}[format]
        milliseconds = whole * (1 - 0.065 * strength) * (1 + 0.02 * math.sin(number))
        drop = 0.0015 * (format != "float32") + 0.0009 * strength**1.9 / (1 + 2 * rung) + 0.001 * math.sin(3 * number)
        status, reason = REASONS.get(number, ("finished", ""))
        done = status == "finished"
        trials.append(
            core.TrialRecord(
                number=number,
                choice=choice_of(strength, format),
                rung=rung,
                status=status,
                reason=reason,
                source="preset" if not strength else "sampler" if number in (12, 13) else "program",
                recipe={"name": f"search-{number}"},
                drop=drop if done else None,
                latency_ms=milliseconds if done else None,
                predicted_drop=1.15 * drop if number > 5 else None,
                predicted_ms=whole * (1 - 0.063 * strength) if strength else None,
                size_bytes=11_468_800 - 600_000 * strength if done else None,
                macs=1_814_073_344 - 110_000_000 * strength if done else None,
                peak_memory_bytes=90_000_000 if done else None,
                seconds=31.0 * 4**rung,
                date="2026-07-01T12:00:00Z",
            )
        )
    return trials


def some_costs() -> list[core.CostRecord]:
    layers = [
        f"layer{stage}.{block}.conv{conv}.weight" for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
    ]
    return [
        core.CostRecord(
            format=format, constant_ms=0.11,
            layers={name: whole * (1 + 0.5 * math.sin(at)) / 20 for at, name in enumerate(layers)},
            points=[
                core.CostPoint(
                    choice=choice_of(at % 12, format), measured_ms=whole * (1 - 0.06 * (at % 12)),
                    predicted_ms=whole * (1 - 0.06 * (at % 12)) * (1 + 0.03 * math.sin(at) * (1 + at % 2)),
                    size_bytes=10**7, macs=10**9, fitted=at % 2 == 0,
                )
                for at in range(20)
            ],
        )
        for format, whole in (("float32", 6.2), ("int8", 4.1))
    ]  # fmt: skip


def some_damages() -> core.DamageRecord:
    blocks = [core.DamageRow(name=name, kind="block", options=[1, 0], damages=[0.0, 0.02 * 1.9**at])
              for at, name in enumerate(BLOCKS)]  # fmt: skip
    families = [
        core.DamageRow(
            name=name, kind="channel", options=[size, 3 * size // 4, size // 2, size // 4, size // 8],
            damages=[0.0, -0.001, 0.01 * (1 + at), 0.06 * (1 + at), 0.3 * (1 + at)],
        )
        for at, (name, size) in enumerate(WIDTHS.items())
    ]  # fmt: skip
    return core.DamageRecord(measure="rise of the loss on 256 examples", rows=[*blocks, *families])


def a_ladder(trials: list[core.TrialRecord]) -> core.Ladder:
    verdicts = {14: (True, 0.0061), 18: (True, 0.0092), 19: (False, 0.0131)}
    steps = [
        core.LadderStep(
            trial=number, latency_ms=trials[number].latency_ms, search_drop=trials[number].drop,
            certify_drop=bound - 0.004, upper_bound=bound, certified=certified,
        )
        for number, (certified, bound) in verdicts.items()
    ]  # fmt: skip
    return core.Ladder(confidence=0.95, spent=0.955, times_asked=1, steps=steps, untested=[16])


def a_search(**changed: object) -> core.SearchRecord:
    trials = some_trials()
    fields: dict[str, object] = {
        "minutes": 60.0, "seconds": 2460.0, "seed": 7, "method": "integer program over measured tables",
        "original_metric": 0.9362, "baseline_ms": 6.2, "decisions": 16, "costs": some_costs(), "trials": trials,
        "frozen": ["layer2.0.downsample: its shape changes"], "damages": some_damages(), "front": FRONT,
        "ladder": a_ladder(trials), "chosen": 18, "notes": ["2 formats were tried whole"],
    }  # fmt: skip
    return core.SearchRecord(**(fields | changed))


def report_of(**changed: object) -> Report:
    return a_report(search=a_search(**changed))


def found_of(report: Report) -> Found:
    found = search.found(report)
    assert found is not None
    return found


def titles(svg: object) -> list[str]:
    """Tooltips of a figure, its own title left out."""
    root = ElementTree.fromstring(re.sub(r"xlink:href", "href", str(svg)))  # noqa: S314 - our own drawing
    return ["".join(part.itertext()) for part in root.iter() if part.tag.endswith("title")][1:]


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(report_of())


def test_the_front_of_the_example_is_the_front() -> None:
    trials = found_of(report_of()).measured
    best = front([(trial.latency_ms, trial.drop) for trial in trials])
    assert [trials[index].number for index in best] == FRONT


def test_the_page_shows_the_search(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert ("id", "search") in page.attributes
    assert ("href", "#search") in page.attributes
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert not {"script", "link", "img"} & set(page.tags)
    for part in (
        "20 trials, 3 of them failed, in 41 min of 60 min allowed. Integer program over measured tables, seed 7",
        "16 decisions about blocks and families. Chosen was trial 18: int8: without layer1.1; ",
        "17of 20 trials measured 11on the front",
        "3 candidates were tested on the certify split, in an order fixed before; 2 passed, with 95 % confidence for "
        "all of them together.",
        "all at 95.5 %",
        "Not tested, behind the first failure: trial 16.",
        "the loss became NaN in step 212",
        "2 formats were tried whole",
        "layer2.0.downsample: its shape changes",
        "Every call in int8: 0.110 ms besides.",
    ):
        assert part in page.words, part
    assert len(html.encode()) < 700_000
    assert render_html(report_of()) == html


def test_ladder_is_a_table_in_the_order_of_testing(html: str) -> None:
    ladder = html[html.index("Certificate ladder</h3>") : html.index("Not tested, behind")]
    rows = [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", ladder, re.S)][1:]  # fmt: skip
    assert [row[:2] for row in rows] == [["1", "14"], ["2", "18, chosen"], ["3", "19"]]
    assert [row[4:] for row in rows] == [
        ["0.21", "0.61", "certified"], ["0.52", "0.92", "certified"], ["0.91", "1.31", "not certified"],
    ]  # fmt: skip


def test_every_trial_of_the_front_plot_tells_what_it_is() -> None:
    found = found_of(report_of())
    told = titles(front_plot(found))
    assert len(told) == len(found.measured) == 17
    (chosen,) = [text for text in told if "chosen" in text]
    trial = found.chosen
    lines = chosen.splitlines()
    assert lines[0] == "Trial 18, rung 2, program, on the front, chosen"
    assert lines[1].startswith("int8: without layer1.1; layer1.0.conv1.weight[0] 44 of 64, ")
    assert lines[1].endswith(" and 5 more")
    assert lines[2] == f"drop {100 * trial.drop:.2f} points of top1 on the search split"
    assert lines[3] == "on the certify split 0.52, at most 0.92: certified"
    assert re.fullmatch(
        r"2\.\d+ ms: 2\.\d× faster than uncompressed in the same runtime, \d\.\d× faster than PyTorch eager", lines[4]
    )


def test_what_is_drawn_stands_where_the_record_says() -> None:
    """Faster is further left, a larger drop is higher, and what is far beyond the budget is held at the edge."""
    found = found_of(report_of())
    text = str(front_plot(found))
    places = {}
    for title, rest in re.findall(r"<g><title>Trial (\d+),[^<]*</title>(.*?)</g>", text, re.S):
        x, y = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', rest).groups()
        places[int(title)] = (float(x), -float(y))
    trials = {trial.number: trial for trial in found.measured}
    assert set(places) == set(trials)
    by_time = sorted(trials, key=lambda number: trials[number].latency_ms)
    assert by_time == sorted(trials, key=lambda number: places[number][0])
    limit = 4 * found.max_drop
    low = [number for number in trials if trials[number].drop < limit]
    assert sorted(low, key=lambda n: trials[n].drop) == sorted(low, key=lambda n: places[n][1])
    high = {places[number][1] for number in trials if trials[number].drop > limit}
    assert len(high) == 1
    assert high.pop() > max(places[number][1] for number in low)


def test_errors_are_given_apart_for_fitted_and_other_points() -> None:
    found = found_of(report_of())
    gaps = {gap.format: gap for gap in found.gaps()}
    cost = found.record.costs[0]
    assert gaps["float32"].fitted == (cost.error(fitted=True), 10)
    assert gaps["float32"].unfitted == (cost.error(fitted=False), 10)
    told = titles(latencies_plot(found))
    assert len(told) == 40 + len(found.trials_apart)
    assert all(re.search(r"\npredicted [\d.]+ ms, measured [\d.]+ ms$", text) for text in told)
    drops = titles(drops_plot(found))
    assert len(drops) == sum(trial.predicted_drop is not None for trial in found.measured)
    gap = found.drop_gap()
    assert gap.n == len(drops)
    assert gap.median == pytest.approx(0.15 * median(t.drop for t in found.measured if t.predicted_drop is not None))


def test_trials_alone_give_an_error_where_no_table_is() -> None:
    found = found_of(report_of(costs=[]))
    (gap,) = found.gaps()
    assert (gap.format, gap.fitted, gap.unfitted) == ("int8", None, None)
    assert gap.trials == found.latency_gap()
    assert gap.trials.n == sum(trial.predicted_ms is not None for trial in found.measured)


def test_best_so_far_only_falls_and_never_leaves_the_budget() -> None:
    found = found_of(report_of())
    text = str(history_plot(found))
    assert len(titles(text)) == 20
    assert sum("timeout: after 312 s" in told for told in titles(text)) == 1
    assert "best inside the budget on the search split" in text
    assert "best of those that were certified in the end" in text
    without = str(history_plot(found_of(report_of(ladder=None))))
    assert "certified in the end" not in without
    assert history_plot(found_of(a_report(search=a_search(), certificate=None, budget={}))) is None


def test_maps_have_a_cell_for_every_layer_and_option() -> None:
    record = a_search()
    cells = titles(costs_plot(record.costs))
    assert len(cells) == 2 * 16
    assert "layer1.0.conv1.weight: 0.310 ms in float32" in cells
    harms = titles(damages_plot(record.damages))
    assert len(harms) == 8 + 8 * 4
    assert "layer1.1: the block goes, 0.020" in harms
    assert "layer1.0.conv1.weight[0]: 32 of 64 units stay, 0.010" in harms
    assert "layer1.0.conv1.weight[0]: 48 of 64 units stay, −0.0010" in harms


def test_too_many_layers_are_cut_to_the_dearest() -> None:
    cost = core.CostRecord(format="int8", constant_ms=0.1, layers={f"l{n}": float(n) for n in range(200)}, points=[])
    rows = [core.DamageRow(name=f"f{n}", kind="channel", options=[8, 4], damages=[0.0, 0.1]) for n in range(200)]
    record = a_search(costs=[cost], damages=core.DamageRecord(measure="loss", rows=rows))
    cells = titles(costs_plot(record.costs))
    assert [cell.split(":")[0] for cell in cells] == [f"l{n}" for n in range(200 - ROWS_DRAWN, 200)]
    words = Page(render_html(a_report(search=record))).words
    assert "140 more are in report.json" in words
    assert "140 more decisions are in report.json" in words


def test_a_given_recipe_says_nothing_of_a_search() -> None:
    report = a_report()
    assert 'id="search"' not in render_html(report)
    assert "search:" not in terminal(report)
    assert "## Search" not in render_card(report, files={})


def test_a_search_without_trials_renders_everywhere() -> None:
    empty = core.SearchRecord(minutes=1.0, seconds=61.0, seed=0, method="sampler", original_metric=0.5, decisions=0)
    for report in (a_report(search=empty), bare_report().model_copy(update={"search": empty})):
        page = Page(render_html(report))
        assert page.open == []
        assert "0 trials in 61.0 s of 60.0 s allowed" in page.words
        assert "No trial was chosen." in page.words
        assert "Certificate ladder" not in page.words
        assert "None" not in page.words
        assert "0 trials in 61.0 s of 60.0 s allowed; 0 on the front, none chosen" in " ".join(terminal(report).split())
        assert "## Search" not in render_card(report, files={})


def test_no_ladder_no_baseline_no_budget() -> None:
    record = a_search(ladder=None, baseline_ms=None, chosen=None)
    report = a_report(search=record, certificate=None, budget={"max_drop": None}, verdict="no certificate")
    page = Page(render_html(report))
    assert page.open == []
    assert "Certificate ladder" not in page.words
    assert "best inside the budget" not in page.words
    told = titles(front_plot(found_of(report)))
    assert not any("same runtime" in text for text in told)
    assert all("PyTorch eager" in text for text in told)


def test_nothing_passed_is_said() -> None:
    trials = some_trials()
    ladder = a_ladder(trials)
    failed = ladder.model_copy(update={"steps": [ladder.steps[2]], "untested": [14, 16, 18]})
    words = Page(render_html(report_of(ladder=failed))).words
    assert "1 candidate was tested on the certify split; none passed." in words
    assert "trials 14, 16, 18." in words


def test_hostile_strings_stay_text(html: str) -> None:
    choice = core.Choice(skipped=(HOSTILE,), widths={HOSTILE: 3}, format=HOSTILE)
    trials = [
        trial.model_copy(update={"choice": choice, "reason": HOSTILE, "recipe": {HOSTILE: HOSTILE}})
        for trial in some_trials()
    ]
    point = core.CostPoint(choice=choice, measured_ms=1.0, predicted_ms=2.0, size_bytes=1, macs=1, fitted=False)
    record = a_search(
        trials=trials, method=HOSTILE, frozen=[HOSTILE], notes=[HOSTILE, "\x1b[31mred \u202egnp.exe"],
        costs=[core.CostRecord(format=HOSTILE, constant_ms=1.0, layers={HOSTILE: 1.0}, points=[point])],
        damages=core.DamageRecord(
            measure=HOSTILE, rows=[core.DamageRow(name=HOSTILE, kind=HOSTILE, options=[4, 2], damages=[0.0, 1.0])]
        ),
    )  # fmt: skip
    report = a_report(search=record)
    attacked = render_html(report)
    page = Page(attacked)
    assert page.open == []
    assert set(page.tags) <= set(Page(html).tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script" not in attacked
    assert not {"\x1b", "\u202e"} & set(attacked)
    assert any("</svg><script>alert(1)" in text for text in titles(front_plot(found_of(report))))
    card = render_card(report, files={})
    assert "<script" not in card.replace(r"\<script", "")
    assert "\x1b" not in terminal(report)


def test_numbers_out_of_bounds_are_not_drawn() -> None:
    odd = [math.nan, math.inf, -math.inf, 0.0, -1.0]
    trials = [
        trial.model_copy(update={"latency_ms": odd[at % 5], "predicted_ms": odd[at % 5], "predicted_drop": odd[at % 5]})
        if at % 2
        else trial.model_copy(update={"drop": odd[at % 3]})
        for at, trial in enumerate(some_trials())
    ]
    cost = core.CostRecord(format="int8", constant_ms=math.nan, layers={"a": math.nan, "b": math.inf}, points=[])
    rows = [
        core.DamageRow(name="a", kind="block", options=[1, 0], damages=[0.0, math.inf]),
        core.DamageRow(name="b", kind="block", options=[1, 0], damages=[0.0, math.nan]),
        core.DamageRow(name="c", kind="block", options=[0, 0], damages=[]),
    ]
    record = a_search(trials=trials, costs=[cost], damages=core.DamageRecord(measure="loss", rows=rows), chosen=99,
                      front=[1, 2, 400], baseline_ms=math.nan, seconds=math.nan)  # fmt: skip
    report = a_report(search=record)
    for text in (Page(render_html(report)).words, terminal(report), render_card(report, files={})):
        assert not re.search(r"\b(nan|inf)\b", text)


def test_the_terminal_and_the_card_name_the_chosen_trial() -> None:
    report = report_of()
    line = " ".join(terminal(report, width=200).split())
    assert "search: 20 trials, 3 of them failed, in 41 min of 60 min allowed; 11 on the front, trial 18 chosen" in line
    gap = found_of(report).latency_gap()
    assert f"latency predicted within {100 * gap.median:.1f} % (median of {gap.n})" in line
    card = render_card(report, files={})
    assert "Chosen was trial 18 (int8: without layer1.1; " in card
    assert "11 of them are not beaten in both drop and latency." in card


def test_the_record_survives_json_and_older_reports_have_none() -> None:
    report = report_of()
    assert Report.model_validate_json(report.model_dump_json()) == report
    before = report.model_dump(mode="json")
    del before["search"]
    assert Report(**before).search is None


def test_metrics_that_are_no_shares_keep_their_units() -> None:
    model = a_report().deployed.model_copy(update={"metric_name": "mIoU"})
    report = a_report(search=a_search(), deployed=model, certificate=a_certificate())
    told = titles(front_plot(found_of(report)))
    assert any(re.search(r"\ndrop 0\.0\d+ mIoU on the search split", text) for text in told)
