"""The report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tersor.core.report import Latency, Report
from tersor.report import search, units, wording

Value = TypeVar("Value", int, float)
_STYLES = {"certified": "bold green", "not certified": "bold red", "no certificate": "bold yellow"}
_SIGNS = {"certified": "✓", "not certified": "✗", "no certificate": "○"}


def render_table(report: Report) -> RenderableType:
    """Builds the table of measurements, with the verdict below.

    Names and warnings are shown as plain text: neither rich markup nor terminal codes in them take effect.

    Args:
        report: The frozen record of a run.

    Returns:
        Something that ``rich.console.Console().print`` takes.
    """
    table = Table(
        title=Text(units.one_line(report.name, 60), style="bold"),
        caption=Text(f"{wording.where(report)} · {units.one_line(report.environment.cpu, 60)}", style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for position, header in enumerate(_headers(report)):
        table.add_column(Text(header), justify="right" if position else "left", no_wrap=position == 0)
    for row in _rows(report):
        table.add_row(*(Text(cell) for cell in row))
    parts: list[RenderableType] = [table, Padding(_verdict(report), (1, 0, 0, 0))]
    if line := search.line(report):
        parts.append(Text(line))
    parts += [Text(f"! {caution}", style="yellow") for caution in _cautions(report)]
    return Group(*parts)


def _headers(report: Report) -> list[str]:
    deployed = f"deployed\n{units.one_line(report.deployed.precision, 16)}"
    if not wording.has_runtime_baseline(report):
        return ["", "eager\nbaseline", deployed, "gain"]
    runtime = units.one_line(report.runtime_baseline.runtime, 16)
    return ["", "eager\nbaseline", f"{runtime}\nbaseline", deployed, "gain vs\neager", "gain vs\nruntime"]


def _rows(report: Report) -> list[list[str]]:
    models = (report.baseline, report.runtime_baseline, report.deployed)
    metric = report.deployed.metric_name
    times = [facts.latency_ms for facts in models]
    rows = [
        _row("size", [facts.size_bytes for facts in models], units.byte_count),
        _row("parameters", [facts.parameters for facts in models], units.count),
        _row("non-zero", [facts.nonzero_parameters for facts in models], units.count),
        _row("MACs", [facts.macs for facts in models], units.count),
        [
            *_row("latency, median", [_median(time) for time in times], units.milliseconds)[:4],
            units.ratio(report.ratios.latency),
            units.ratio(report.ratios.latency_same_runtime),
        ],
        _row("latency, p95", [_p95(time) for time in times], units.milliseconds),
        _row("throughput", [facts.throughput for facts in models], units.rate, more_is_better=True),
        _row("peak memory", [facts.peak_memory_bytes for facts in models], units.byte_count),
    ]
    scores = [facts.metric for facts in models]
    changes = [_change(score, scores[2], metric) for score in scores[:2]]
    rows.insert(0, [units.one_line(metric, 20), *(units.metric_value(score, metric) for score in scores), *changes])
    if wording.has_runtime_baseline(report):
        return rows
    return [[row[0], row[1], row[3], row[4]] for row in rows]


def _row(
    label: str,
    values: Sequence[Value | None],
    text: Callable[[Value | None], str],
    *,
    more_is_better: bool = False,
) -> list[str]:
    """One quantity of eager baseline, runtime baseline and deployed, with the gain over each baseline."""
    deployed = values[2]
    gains: list[float | None] = [
        _quotient(deployed, value) if more_is_better else _quotient(value, deployed) for value in values[:2]
    ]
    return [label, *(text(value) for value in values), *(units.ratio(gain) for gain in gains)]


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _median(time: Latency | None) -> float | None:
    return time.median if time else None


def _p95(time: Latency | None) -> float | None:
    return time.p95 if time else None


def _change(before: float | None, after: float | None, metric: str) -> str:
    """How far the deployed metric lies from a baseline's, with its sign."""
    if before is None or after is None:
        return units.MISSING
    sign = "+" if after > before else ""
    points = " pt" if units.is_share(metric) else ""
    return f"{sign}{units.difference(after - before, metric)}{points}"


def _verdict(report: Report) -> Text:
    line = Text(f"{_SIGNS[report.verdict]} {wording.verdict(report)}", style=_STYLES[report.verdict])
    line.append(": ", style="not bold default")
    certificate = report.certificate
    if certificate is None:
        return line.append(f"how much {units.one_line(report.deployed.metric_name, 40)} is lost is not bounded.")
    metric = wording.certified_metric(report)
    budget = units.exact_difference(certificate.max_drop, metric)
    counted = f"{units.integer(certificate.n)} examples, {wording.METHODS[certificate.method]}"
    if level := wording.level(certificate):
        counted += f", tested at {level}"
    text = f"{wording.bounded_loss(report, certificate)}; the budget is {budget} ({counted})."
    return line.append(f"{text} {wording.advice(certificate)}".strip(), style="not bold default")


def _cautions(report: Report) -> list[str]:
    return [units.one_line(caution) for caution in report.warnings]
