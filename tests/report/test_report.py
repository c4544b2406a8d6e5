"""The page, the card and the table: complete, escaped, repeatable, and fit for the odd report."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

from markdown_it import MarkdownIt
from rich.console import Console

from tersor.core import report as core
from tersor.core.certificate import Certificate
from tersor.core.report import Changes, ClassChange, Latency, Layer, ModelFacts, Report
from tersor.report import render_card, render_html, render_table, units, wording

HOSTILE = "</svg><script>alert(1)</script> $\\frac$ {{7*7}} {% raw %} \"'><img src=x onerror=a> [x](data:a)"
NAMES = ["cat", "dog", "automobile", "airplane", "very long name of a striped animal", "ship", "猫の写真です"]


def a_latency(median: float, spread: float = 0.04, rounds: int = 12) -> Latency:
    """Skewed call times around `median`, as a real machine gives them."""
    shares = [(index + 0.5) / 201 for index in range(201)]
    times = [median * (1 + spread * (math.log(share / (1 - share)) / 2 + share**12)) for share in shares]
    drift = [1 + spread * math.sin(1.3 * number) / 4 + 0.02 * (number == 7) for number in range(rounds)]
    medians = [median * (factor + math.sin(median + 2 * at) / 160) for at, factor in enumerate(drift)]
    return Latency(
        median=median, p95=times[190], iqr=times[150] - times[50], n=20 * rounds, best=times[0],
        rounds=medians, histogram=times,
    )  # fmt: skip


def some_layers(count: int) -> list[Layer]:
    """A convolutional network with growing widths."""
    return [
        Layer(
            name=f"layer{1 + 4 * number // count}.{number}.conv{1 + number % 2}", kind="Conv2d",
            parameters=weights, nonzero_parameters=weights - weights * (number % 5) // 12,
            macs=115_605_504 // (1 + number % 7), precision="int8" if number % 9 else "float32",
            weight_error=0.004 + 0.0007 * (number % 6) if number % 9 else None,
        )
        for number in range(count)
        for weights in [9 * (64 << 4 * number // count) ** 2]
    ]  # fmt: skip


def some_classes(count: int) -> list[ClassChange]:
    """Classes that mostly lose a little."""
    names = [*NAMES, *(f"class {number}" for number in range(count))][:count]
    before = [0.95 - 0.03 * (number % 8) for number in range(count)]
    after = [share - 0.008 * (number * 5 % 9 - 3) for number, share in enumerate(before)]
    rows = zip(names, before, after, strict=True)
    return [ClassChange(name=name, n=500, before=first, after=second) for name, first, second in rows]


def a_certificate(**changed: object) -> Certificate:
    """A certificate that keeps its budget, unless `changed`."""
    fields: dict[str, object] = {
        "upper_bound": 0.0062, "method": "exact-paired", "certified": True, "losses": 31, "gains": 21,
        "split_fingerprint": "9f86d081884c7d659a2feaa0c55ad015", "max_drop": 0.01, "confidence": 0.95,
        "drop": 0.002, "n": 5000, "exact": True,
    }  # fmt: skip
    return Certificate(**(fields | changed))


def facts(runtime: str, precision: str, size: int, median: float | None, metric: float | None) -> ModelFacts:
    """Measurements of one model."""
    return ModelFacts(
        metric=metric, metric_name="top1", size_bytes=size, runtime=runtime, precision=precision,
        parameters=11_689_512, nonzero_parameters=11_689_512 if precision == "float32" else 8_310_404,
        macs=1_814_073_344 if precision == "float32" else 1_003_520_000,
        latency_ms=None if median is None else a_latency(median),
        peak_memory_bytes=None if median is None else 3 * size + 60_000_000,
        throughput=None if median is None else 1000 / median,
    )  # fmt: skip


def a_report(**changed: object) -> Report:
    """A realistic run: a residual network, pruned and quantized for onnxruntime."""
    fields: dict[str, object] = {
        "name": "resnet18-cifar10",
        "verdict": "certified",
        "warnings": ["2 batch norms could not be folded and stay as they are."],
        "baseline": facts("eager", "float32", 44_731_112, 21.3, 0.9362),
        "runtime_baseline": facts("onnxruntime", "float32", 44_683_221, 6.21, 0.9362),
        "deployed": facts("onnxruntime", "int8", 11_468_800, 2.96, 0.9342),
        "ratios": core.Ratios(size=3.9, latency=7.2, latency_same_runtime=2.1, macs=1.81),
        "certificate": a_certificate(),
        "changes": Changes(
            n=10_000, flips=143, right_to_wrong=72, wrong_to_right=52, per_class=some_classes(10),
            calibration_error_before=0.0312, calibration_error_after=0.0347,
        ),
        "coverage": core.Coverage(
            parameters_quantized=0.998, macs_quantized=0.934, parameters_pruned=0.289,
            float_operators=["Softmax (1)", "GlobalAveragePool (1)"],
        ),
        "layers": some_layers(60),
        "size_breakdown": {"model.onnx": 11_420_112, "labels.json": 48_688},
        "environment": core.Environment(
            machine="x86_64", cpu="Intel Xeon Platinum 8481C", cpu_flags=["avx2", "avx512_vnni", "amx_int8"],
            cores=2, threads=2, system="Linux 6.8", python="3.11.9", date="2026-07-01T12:00:00Z", seed=0,
            versions={"torch": "2.11.0", "onnxruntime": "1.22.0", "tersor": "0.1.0"},
        ),
        "recipe": {"steps": [{"step": "prune", "amount": 0.3}, {"step": "quantize", "bits": 8}]},
        "target": {"runtime": "onnxruntime", "device": "cpu", "threads": 2, "batch": 1, "dynamic": {}},
        "budget": {"max_drop": 0.01, "confidence": 0.95, "minimise": "latency"},
        "history": [
            core.StepRecord(name="prune", settings={"amount": 0.3, "criterion": "taylor"}, seconds=62.4,
                       notes=["removed 1,344 of 4,800 channels"]),
            core.StepRecord(name="finetune", settings={"epochs": 3, "lr": 0.01}, seconds=912.0),
            core.StepRecord(name="quantize", settings={"bits": 8, "observer": "histogram"}, seconds=8.31,
                       notes=["58 of 60 layers", "kept conv1 and fc in float"]),
        ],
    }  # fmt: skip
    return Report(**(fields | changed))


def bare_report() -> Report:
    """A report in which everything optional is absent."""
    model = facts("eager", "float32", 400, None, None)
    return a_report(
        verdict="no certificate", warnings=[], baseline=model, runtime_baseline=model, deployed=model,
        ratios=core.Ratios(size=1.0, latency=None, latency_same_runtime=None, macs=1.0),
        certificate=None, changes=None, layers=[], size_breakdown={}, history=[], recipe={}, target={},
        budget={}, coverage=core.Coverage(parameters_quantized=0.0, macs_quantized=0, parameters_pruned=0),
    )  # fmt: skip


def hostile_report() -> Report:
    """Every string that comes from outside carries an attack."""
    model = facts("onnxruntime", HOSTILE, 400, 1.0, 0.5).model_copy(update={"metric_name": HOSTILE})
    return a_report(
        name=HOSTILE, warnings=[HOSTILE, "\x1b[31mred\x1b[0m \u202egnp.exe"],
        runtime_baseline=model.model_copy(update={"runtime": HOSTILE}), deployed=model,
        changes=Changes(n=3, flips=1, per_class=[ClassChange(name=HOSTILE, n=3, before=1, after=0)]),
        coverage=a_report().coverage.model_copy(update={"float_operators": [HOSTILE]}),
        layers=[some_layers(1)[0].model_copy(update=dict.fromkeys(("name", "kind", "precision"), HOSTILE))],
        size_breakdown={HOSTILE: 1}, recipe={HOSTILE: HOSTILE}, target={HOSTILE: HOSTILE, "batch": HOSTILE},
        budget={HOSTILE: [HOSTILE]},
        history=[core.StepRecord(name=HOSTILE, settings={HOSTILE: HOSTILE}, seconds=1.0, notes=[HOSTILE])],
        environment=a_report().environment.model_copy(
            update={"cpu": HOSTILE, "system": HOSTILE, "versions": {HOSTILE: HOSTILE}, "cpu_flags": [HOSTILE]}
        ),
    )  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes, identifiers and text, and checks that tags are balanced."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def terminal(report: Report, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_table(report))
    return console.file.getvalue()


def test_page_says_the_result_in_one_sentence() -> None:
    page = Page(render_html(a_report()))
    assert page.open == []
    assert (
        "3.9× smaller, 7.2× faster than PyTorch eager, 2.1× faster than the uncompressed model on the same "
        "runtime (onnxruntime, 2 threads, batch 1); with 95 % confidence at most 0.62 points of top1 lost."
    ) in page.words
    for part in ("21.3 ms → 2.96 ms", "44.7 MB → 11.5 MB", "3.1 % before, 3.5 % after", "Softmax (1)"):
        assert part in page.words


def test_page_is_offline_and_small() -> None:
    html = render_html(a_report())
    page = Page(html)
    assert len(html.encode()) < 300_000
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    assert not re.findall(r"https?://(?!www\.w3\.org)", html)
    targets = [value for name, value in page.attributes if name in {"href", "src", "xlink:href"}]
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert all(target and target.startswith("#") and target[1:] in identifiers for target in targets)


def test_same_report_gives_the_same_bytes_under_any_matplotlib_settings() -> None:
    import matplotlib

    expected = render_html(a_report())
    assert render_html(a_report()) == expected
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert render_html(a_report()) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_hostile_strings_stay_text_in_the_page() -> None:
    harmless, page = Page(render_html(a_report())), Page(render_html(hostile_report()))
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert set(page.tags) <= set(harmless.tags) | {"details", "summary"}
    assert "{{7*7}}" in page.text
    assert "$\\frac$" in page.text
    assert not {"\x1b", "\u202e"} & set(render_html(hostile_report()))


def test_hostile_strings_stay_text_in_figures() -> None:
    short = ["</svg><script>", "$\\frac$", "{{7*7}}", "a\nb\x00c", "中文 \u202e"]
    classes = [ClassChange(name=name, n=3, before=0.5, after=0.25) for name in short]
    html = render_html(a_report(changes=Changes(n=3, flips=1, per_class=classes)))
    labels = re.findall(r"<text [^>]*>([^<]*)</text>", html)
    for name in ("&lt;/svg&gt;&lt;script&gt;", "$\\frac$", "{{7*7}}", "a b\ufffdc", "中文 \ufffd"):
        assert name in labels


def test_bare_report_renders_everywhere() -> None:
    report = bare_report()
    page = Page(render_html(report))
    assert "No layers were recorded." in page.words
    assert "speed not measured" in page.words
    assert "None" not in page.words
    assert "svg" not in page.tags
    assert "No certificate" in terminal(report)
    assert "None" not in render_card(report, files={})


def test_many_layers_and_classes_collapse() -> None:
    changes = Changes(n=50_000, flips=900, per_class=some_classes(1000))
    page = Page(render_html(a_report(layers=some_layers(1000), changes=changes)))
    assert page.tags.count("details") == 2
    assert "Show all 1,000 layers" in page.words
    assert "The 20 classes that lost most, of 1,000." in page.words
    short = Page(render_html(a_report(layers=some_layers(5))))
    assert short.tags.count("details") == 1


def test_extreme_numbers_render() -> None:
    certificate = a_certificate(drop=0.0, upper_bound=math.inf, certified=False, max_drop=0.0, n=1)
    deployed = facts("onnxruntime", "int8", 0, 1e-9, math.nan)
    odd = {"name": "x" * 500, "parameters": 0, "macs": 0, "weight_error": 1e-12}
    layer = some_layers(1)[0].model_copy(update=odd)
    report = a_report(
        name="y" * 500, verdict="not certified", certificate=certificate, deployed=deployed, layers=[layer],
        ratios=core.Ratios(size=math.inf, latency=1e-7, latency_same_runtime=math.nan, macs=0.0),
    )  # fmt: skip
    for text in (Page(render_html(report)).words, terminal(report), render_card(report, files={})):
        assert "the loss could not be bounded" in text
        assert not re.search(r"\b(nan|inf)\b", text)


def test_not_certified_and_repeated_questions_are_plain() -> None:
    certificate = a_certificate(
        upper_bound=0.0134, certified=False, times_asked=3, examples_needed=12_400, exact=False,
        method="paired-bootstrap",
    )  # fmt: skip
    report = a_report(verdict="not certified", certificate=certificate)
    words = Page(render_html(report)).words
    assert "asked 3 times" in words
    assert "passes sooner or later by luck" in words  # of a former version: nothing was spent
    assert "this test alone" not in words
    for text in (words, " ".join(terminal(report).split())):
        assert "Not certified (approximate)" in text
        assert "about 12,400 certify examples" in text
        assert "with about 95 % confidence at most 1.34 points of top1 lost" in text


def test_what_earlier_questions_spent_is_shown() -> None:
    certificate = a_certificate(level=0.99955, times_asked=3)
    report = a_report(certificate=certificate)
    words = Page(render_html(report)).words
    assert "95 % confidence, one-sided; this test alone at 99.955 %" in words
    assert "by 3 runs, see certify-ledger.jsonl" in words
    assert "tested at 99.955 %, so that 95 % holds over all questions together" in words
    assert "tested at 99.955 %" in " ".join(terminal(report).split())
    assert "tested at 99.955 %" in render_card(report, files={})
    assert wording.level(a_certificate(level=math.nextafter(1, 0))) == "99.9999999999 %"
    assert wording.level(a_certificate(level=0.95)) == wording.level(a_certificate()) == ""


def test_certificates_of_former_versions_load() -> None:
    fields = a_certificate().model_dump(mode="json", exclude={"level"})
    assert Certificate.model_validate_json(json.dumps(fields)) == a_certificate()


def test_slower_is_called_slower() -> None:
    ratios = core.Ratios(size=0.5, latency=1.001, latency_same_runtime=0.8, macs=1.0)
    sentence = wording.headline(a_report(ratios=ratios))
    assert sentence.startswith("2.0× larger, as fast as PyTorch eager, 1.2× slower than the uncompressed")


def test_noisy_measurements_are_named() -> None:
    deployed = a_report().deployed.model_copy(update={"latency_ms": a_latency(3.0, spread=0.3)})
    assert wording.noisy(a_report(deployed=deployed)).startswith("Noisy: deployed varied")
    assert not wording.noisy(a_report())


def test_other_metrics_keep_their_units() -> None:
    model = a_report().deployed.model_copy(update={"metric_name": "mIoU", "metric": 0.71234})
    report = a_report(deployed=model)
    assert wording.headline(report).endswith("at most 0.00620 mIoU lost.")
    agreement = report.model_copy(update={"certificate": a_certificate(measures="agreement")})
    assert wording.headline(agreement).endswith("at most 0.62 points of agreement lost.")


def test_bounds_are_rounded_towards_more_loss() -> None:
    bounds = {0.0062: "0.62", 0.00621: "0.63", 0.0100001: "1.01", 1e-6: "0.000100", -0.002: "−0.20"}
    assert {bound: units.difference(bound, "top1", upwards=True) for bound in bounds} == bounds


def test_units() -> None:
    assert [units.byte_count(size) for size in (999, 999_950)] == ["999 B", "1.00 MB"]
    assert [units.milliseconds(time) for time in (1e-6, 1234.5, None)] == ["1×10⁻⁶ ms", "1,230 ms", "—"]
    assert [units.percent(share) for share in (0.99999, 0.00001, 1.0)] == ["> 99.99 %", "< 0.01 %", "100 %"]
    assert units.count(11_689_512) == "11.7 M"
    assert units.seconds(7500) == "2 h 5 min"
    assert units.one_line("a\tb\n c" * 9, 6) == "a b c…"


def test_card_is_complete() -> None:
    card = render_card(
        a_report(), files={"model.onnx": "ab" * 32, "report.json": "cd" * 32},
        inputs={"image": "float32 [batch, 3, 32, 32]"}, outputs={"logits": "float32 [batch, 10]"},
        preprocessing={"mean": [0.49, 0.48, 0.45]}, labels=["cat", "dog"], limits=["Not for medical use."],
    )  # fmt: skip
    for part in (
        "# resnet18-cifar10\n", "| size on disk | 11.5 MB | 44.7 MB | 44.7 MB |", "n = 10,000",
        "5,000 examples", "tersor.load(", 'InferenceSession("model.onnx"', "ab" * 32,
        '"image": ...,  # float32 [batch, 3, 32, 32]',
        "- logits:", "- mean:", "cat, dog", "Not for medical use.", "at most 0.62 points of top1 lost",
    ):  # fmt: skip
        assert part in card


def test_card_code_is_valid_python() -> None:
    report = a_report()
    names = {"image'\n": HOSTILE, "```": "```\nimport os"}
    for runtime, file in (("onnxruntime", "model.onnx"), ("openvino", "model.xml")):
        deployed = report.deployed.model_copy(update={"runtime": runtime})
        for inputs in (names, None):
            card = render_card(a_report(deployed=deployed), files={file: "00"}, inputs=inputs)
            blocks = [token.content for token in MarkdownIt().parse(card) if token.type == "fence"]
            assert len(blocks) == 2
            assert f"import {runtime}" in blocks[1]
            for block in blocks:
                compile(block, "card", "exec")


def test_hostile_strings_stay_text_in_the_card() -> None:
    name = "1. a | b `c` ![x](y) www.x.example https://x.example <b>"
    hostile = {HOSTILE: HOSTILE, name: "- # *z* _z_ &lt; | \\"}
    card = render_card(
        hostile_report(), files={HOSTILE: HOSTILE}, inputs=hostile, outputs=hostile, preprocessing=hostile,
        labels=[HOSTILE], limits=[HOSTILE, "---", "1. x", "+ y"],
    )  # fmt: skip
    markdown = MarkdownIt("gfm-like", {"linkify": False})
    tokens = markdown.parse(card)
    inline = [child for token in tokens for child in token.children or []]
    plain = {"text", "softbreak", "strong_open", "strong_close", "text_special"}
    assert {child.type for child in inline} <= plain
    assert not [token for token in tokens if token.type == "html_block"]
    shown = "".join(child.content for child in inline)
    assert HOSTILE in shown.replace("\n", " ")
    rows = [len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("| ")]
    assert set(rows) == {3, 5}


def test_table_shows_numbers_and_verdict() -> None:
    for width in (80, 140):
        text = terminal(a_report(), width)
        for part in ("93.42 %", "44.7 MB", "21.3 ms", "7.2×", "2.1×", "✓ Certified"):
            assert part in text
    assert "at most 0.62 points of top1 lost; the budget is 1.00 (5,000 examples" in " ".join(text.split())


def test_table_takes_hostile_strings_literally() -> None:
    report = hostile_report().model_copy(update={"name": "[red]x[/red] \x1b[2J"})
    text = terminal(report)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_report_never_imports_pyplot() -> None:
    code = (
        "import sys, tersor.report; assert 'matplotlib' not in sys.modules\n"
        "from tersor.report import svg\n"
        "with svg.drawing('x'):\n"
        "    svg.to_svg(svg.blank_axes(9, left=1, right=1, top=1, bottom=1)[0], 'x')\n"
        "print([name for name in ('matplotlib.pyplot',) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
