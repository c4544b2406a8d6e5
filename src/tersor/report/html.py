"""The report as one HTML file that needs no network and runs no script."""

from __future__ import annotations

import json
from functools import cache
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tersor.core.report import ClassChange, Layer, Report
from tersor.report import plots, pruning, quantization, search, search_plots, units, wording
from tersor.report.coupling import ROWS_SHOWN

LAYERS_SHOWN = 40
LAYERS_SUMMARISED = 12
CLASSES_SHOWN = 20
FILES_SHOWN = 25
FAMILIES_SHOWN = 15


class Tile(NamedTuple):
    """One of the four headline ratios."""

    label: str
    value: str
    words: str
    detail: str
    tone: str


class Bar(NamedTuple):
    """One horizontal bar of a comparison."""

    role: str
    name: str
    value: str
    share: float
    note: str


def render_html(report: Report) -> str:
    """Renders the report as one self-contained HTML page; the same report gives the same bytes.

    All names, warnings and settings in the report are untrusted and are escaped wherever they appear.

    Args:
        report: The frozen record of a run.

    Returns:
        The page, ready to be written as UTF-8.
    """
    certificate = report.certificate
    metric = wording.certified_metric(report)
    timed = [
        (role, name, facts.latency_ms) for role, name, facts in wording.models(report) if facts.latency_ms is not None
    ]
    classes = worst_classes(report)
    found = search.found(report)
    return page_environment().get_template("report.html.j2").render(
        report=report,
        certificate=certificate,
        metric=metric,
        unit=units.metric_unit(metric),
        wording=wording,
        models=wording.models(report),
        tiles=tiles(report),
        certificate_plot=plots.certificate_plot(certificate, metric) if certificate else None,
        latency_plot=plots.latency_plot(timed),
        rounds_plot=plots.rounds_plot(timed),
        classes_plot=plots.classes_plot(classes),
        classes=classes,
        sizes=size_bars(report),
        search=search,
        found=found,
        search_plots=search_plots.drawn(found) if found else None,
        prunings=pruning.parts(report),
        proof=pruning.proof,
        quantizations=quantization.widths(report),
        layers_drawn=quantization.LAYERS_DRAWN,
        families_shown=FAMILIES_SHOWN,
        rows_drawn=ROWS_SHOWN,
        files=sorted(report.size_breakdown.items(), key=lambda item: (-item[1], item[0])),
        files_shown=FILES_SHOWN,
        heavy_layers=heavy_layers(report.layers),
        longest_step=max((step.seconds for step in report.history), default=0.0),
    )  # fmt: skip


@cache
def page_environment() -> Environment:
    """Jinja with escaping on for every value, and the units as filters."""
    environment = Environment(
        loader=PackageLoader("tersor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": units.byte_count,
        "count": units.count,
        "integer": units.integer,
        "ms": units.milliseconds,
        "seconds": units.seconds,
        "rate": units.rate,
        "ratio": units.ratio,
        "percent": units.percent,
        "significant": units.significant,
        "metric_value": units.metric_value,
        "difference": units.difference,
        "exact_difference": units.exact_difference,
        "line": units.one_line,
        "json": as_json,
        "settings": settings_line,
        "number01": css_number,
        "capital": wording.capital,
        "small_percent": units.small_percent,
        "day": day,
    }
    environment.globals["fraction"] = units.fraction
    return environment


def _finalize(value: object) -> object:
    """What is printed for a value: a dash for nothing, and no characters that could mislead."""
    if value is None:
        return units.MISSING
    if isinstance(value, Markup):
        return value
    return units.printable(value).replace(" %", "\N{NO-BREAK SPACE}%")


def as_json(value: object) -> str:
    """A nested setting, indented for reading."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def settings_line(settings: dict[str, object]) -> str:
    """Settings of a step on one line."""
    return ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in settings.items())


def day(date: str) -> str:
    """The day of an ISO date and time."""
    return date.partition("T")[0]


def css_number(share: float | None) -> str:
    """A share as a CSS number in 0..1."""
    return f"{min(max(share, 0.0), 1.0):.3g}" if share is not None and units.known(share) else "0"


def tiles(report: Report) -> list[Tile]:
    """The four ratios: size, latency against both baselines, and work per call."""
    eager, runtime, deployed = report.baseline, report.runtime_baseline, report.deployed
    now = deployed.latency_ms.median if deployed.latency_ms else None

    def times(facts_ms: float | None) -> str:
        return f"{units.milliseconds(facts_ms)} → {units.milliseconds(now)}" if facts_ms and now else ""

    eager_ms = eager.latency_ms.median if eager.latency_ms else None
    runtime_ms = runtime.latency_ms.median if runtime.latency_ms else None
    same_runtime = f"the uncompressed model on {units.one_line(runtime.runtime, 16)}"
    return [
        _tile("Size", report.ratios.size, "smaller on disk", "larger on disk",
              f"{units.byte_count(eager.size_bytes)} → {units.byte_count(deployed.size_bytes)}"),
        _tile("Against PyTorch eager", report.ratios.latency, "faster per call", "slower per call",
              times(eager_ms)),
        _tile("Against the same runtime", report.ratios.latency_same_runtime, f"faster than {same_runtime}",
              f"slower than {same_runtime}", times(runtime_ms)),
        _tile("Work per call", report.ratios.macs, "fewer multiply-accumulates",
              "more multiply-accumulates", f"{units.count(eager.macs)} → {units.count(deployed.macs)} MACs"),
    ]  # fmt: skip


def _tile(label: str, ratio: float | None, better: str, worse: str, detail: str) -> Tile:
    if ratio is None or not units.known(ratio) or ratio <= 0:
        return Tile(label, units.MISSING, "not measured", "", "none")
    if not wording.compared(ratio, better, worse, ""):
        return Tile(label, "1.0×", "no difference", detail, "same")
    if ratio > 1:
        return Tile(label, units.ratio(ratio), better, detail, "better")
    return Tile(label, units.ratio(1 / ratio), worse, detail, "worse")


def size_bars(report: Report) -> list[Bar]:
    """Bytes on disk of the deployed model and both baselines, relative to the largest."""
    models = wording.models(report)
    largest = max(facts.size_bytes for _, _, facts in models) or 1
    return [
        Bar(
            role,
            name,
            units.byte_count(facts.size_bytes),
            facts.size_bytes / largest,
            f"{units.count(facts.parameters)} parameters, {facts.precision}",
        )
        for role, name, facts in models
    ]


def worst_classes(report: Report) -> list[ClassChange]:
    """The classes that lost most, worst first."""
    changes = report.changes.per_class if report.changes else []
    usable = [change for change in changes if units.known(change.before) and units.known(change.after)]
    return sorted(usable, key=lambda change: (change.after - change.before, change.name))[:CLASSES_SHOWN]


def heavy_layers(layers: list[Layer]) -> list[Layer]:
    """The layers with most work, to stand for a long table; none when the table is short."""
    if len(layers) <= LAYERS_SHOWN:
        return []
    return sorted(layers, key=lambda layer: (-layer.macs, -layer.parameters, layer.name))[:LAYERS_SUMMARISED]
