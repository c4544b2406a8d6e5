"""The four figures of the page. Each returns an inline SVG, or None when there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, stdev
from typing import Any

from markupsafe import Markup

from tersor.core.certificate import Certificate
from tersor.core.report import ClassChange, Latency
from tersor.report import units
from tersor.report.svg import Colour, blank_axes, drawing, plain, ticks, to_svg

CURVE_POINTS = 160
Timed = tuple[str, str, Latency]  # role, name, times
_STYLES = {
    "deployed": (Colour.DEPLOYED, "o", "-"),
    "runtime": (Colour.RUNTIME, "s", "--"),
    "eager": (Colour.EAGER, "^", ":"),
}


def certificate_plot(certificate: Certificate, metric: str) -> Markup | None:
    """The observed drop and its upper bound against the budget."""
    if not math.isfinite(certificate.drop):
        return None
    scale = 100 if units.is_share(metric) else 1
    drop, budget = scale * certificate.drop, scale * certificate.max_drop
    unbounded = not math.isfinite(certificate.upper_bound)
    low, high = min(0.0, drop), max(drop, budget, 0.0 if unbounded else scale * certificate.upper_bound)
    span = (high - low) or 1.0
    over = not unbounded and scale * certificate.upper_bound > budget
    start, end = (
        low - 0.08 * span,
        high + (0.42 if over else 0.12) * span,
    )  # room for the bound beside its bar
    bound = end if unbounded else scale * certificate.upper_bound
    seen = units.difference(certificate.drop, metric)
    limit = units.difference(certificate.upper_bound, metric, upwards=True)
    allowed = units.exact_difference(certificate.max_drop, metric)
    with drawing("tersor-certificate"):
        figure, axes = blank_axes(170, left=14, right=14, top=30, bottom=44)
        axes.set(xlim=(start, end), ylim=(0, 1))
        axes.set_xlabel(f"drop in {units.metric_unit(metric)}", color=Colour.MUTED, parse_math=False)
        ticks(axes.xaxis, start, end, logarithmic=False)
        axes.axvspan(start, budget, color=Colour.GOOD, alpha=0.1, linewidth=0)
        axes.axvline(budget, color=Colour.GOOD, linewidth=2, linestyle=(0, (4, 2)))
        axes.axvline(0, color=Colour.LINE, linewidth=1)
        _bar(axes, drop, min(bound, budget), Colour.DEPLOYED, hatch="")
        _bar(axes, max(drop, budget), bound, Colour.BAD, hatch="/////")
        axes.plot([bound, bound], [0.32, 0.68], color=Colour.INK, linewidth=2)
        axes.plot([drop], [0.5], "o", markersize=11, color=Colour.INK, markeredgecolor=Colour.SURFACE)
        _mark(axes, budget, 1.06, f"budget {allowed}", Colour.GOOD)
        _mark(axes, bound, 0.78, "not bounded" if unbounded else f"at most {limit}", Colour.INK, beside=over)
        _mark(axes, drop, 0.1, f"observed {seen}", Colour.INK)
        return to_svg(figure, f"Observed drop {seen}, upper bound {limit}, budget {allowed}")


def _bar(axes: Any, start: float, end: float, colour: Colour, hatch: str) -> None:
    if end > start:
        axes.barh(0.5, end - start, left=start, height=0.2, color=colour, alpha=0.55, linewidth=0)
        if hatch:
            axes.barh(
                0.5,
                end - start,
                left=start,
                height=0.2,
                fill=False,
                edgecolor=colour,
                hatch=hatch,
                linewidth=1,
            )


def _mark(axes: Any, position: float, height: float, text: str, colour: Colour, *, beside: bool = False) -> None:
    """Writes at `position`, turned inwards near the edges so that nothing leaves the figure."""
    low, high = axes.get_xlim()
    place = (position - low) / (high - low)
    side = "left" if beside or place < 0.2 else "right" if place > 0.8 else "center"
    axes.text(position, height, text, color=colour, ha=side, weight="bold", size=11, parse_math=False)


def latency_plot(rows: Sequence[Timed]) -> Markup | None:
    """The distribution of each model's call times above one logarithmic axis, fastest side left."""
    rows = [row for row in rows if _drawable(row[2])]
    if not rows:
        return None
    low = min(latency.histogram[0] for _, _, latency in rows) * 0.97
    high = max(max(_quantile(latency, 0.99), latency.p95) for _, _, latency in rows) * 1.03
    with drawing("tersor-latency"):
        figure, axes = blank_axes(66 * len(rows) + 48, left=14, right=14, top=4, bottom=44)
        axes.set_xscale("log")
        axes.set(xlim=(low, high), ylim=(0, len(rows)))
        axes.set_xlabel("milliseconds per call, logarithmic", color=Colour.MUTED)
        ticks(axes.xaxis, low, high, logarithmic=True)
        for floor, (role, name, latency) in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
            _ridge(axes, latency, floor, _STYLES[role][0], low, high)
            numbers = f"{units.significant(latency.median)} ms, p95 {units.significant(latency.p95)}"
            _row_text(axes, floor, 0.012, name, "left", "bold")
            _row_text(axes, floor, 0.988, numbers, "right", "normal")
        spoken = "; ".join(f"{name}: median {units.milliseconds(latency.median)}" for _, name, latency in rows)
        return to_svg(figure, f"Call times. {spoken}")


def _drawable(latency: Latency) -> bool:
    times = latency.histogram
    return len(times) > 1 and all(math.isfinite(time) and time > 0 for time in [*times, latency.p95])


def _quantile(latency: Latency, share: float) -> float:
    return latency.histogram[round(share * (len(latency.histogram) - 1))]


def _row_text(axes: Any, floor: float, place: float, text: str, side: str, weight: str) -> None:
    axes.text(
        place,
        floor + 0.74,
        units.one_line(text, 34),
        transform=axes.get_yaxis_transform(),
        ha=side,
        weight=weight,
        color=Colour.INK,
        parse_math=False,
    )


def _ridge(axes: Any, latency: Latency, floor: float, colour: Colour, low: float, high: float) -> None:
    """One smoothed density on the floor of its row, its median as a line and its p95 as an open circle."""
    step = math.log(high / low) / (CURVE_POINTS - 1)
    grid = [low * math.exp(step * index) for index in range(CURVE_POINTS)]
    density = _density(latency.histogram, grid, narrowest=1.5 * step)
    top = max(density) or 1.0
    heights = [floor + 0.62 * value / top for value in density]
    axes.plot([low, high], [floor, floor], color=Colour.LINE, linewidth=1)
    axes.fill_between(grid, floor, heights, color=colour, alpha=0.35, linewidth=0)
    axes.plot(grid, heights, color=colour, linewidth=1.5)
    axes.plot([latency.median] * 2, [floor, floor + 0.62], color=Colour.INK, linewidth=2)
    axes.plot(
        [latency.p95], [floor + 0.03], "o", markersize=7, color=Colour.SURFACE, markeredgecolor=Colour.INK,
        clip_on=False,
    )  # fmt: skip


def _density(quantiles: Sequence[float], grid: Sequence[float], narrowest: float) -> list[float]:
    """A Gaussian kernel density over equally spaced quantiles, in the logarithm of the time."""
    logs = [math.log(quantile) for quantile in quantiles]
    quarter = len(logs) // 4
    spread = min(stdev(logs), (logs[3 * quarter] - logs[quarter]) / 1.34 or math.inf)
    width = max(0.9 * spread * len(logs) ** -0.2, narrowest)
    return [sum(math.exp(-0.5 * ((math.log(x) - log) / width) ** 2) for log in logs) for x in grid]


def rounds_plot(rows: Sequence[Timed]) -> Markup | None:
    """How far the median of each round lies from the model's middle round: drift of the machine over time."""
    rows = [row for row in rows if len(row[2].rounds) > 1 and _all_positive(row[2])]
    if not rows:
        return None
    lines = [[100 * (time / median(latency.rounds) - 1) for time in latency.rounds] for _, _, latency in rows]
    reach = max(1.0, 1.15 * max(abs(value) for line in lines for value in line))
    longest = max(len(line) for line in lines)
    with drawing("tersor-rounds"):
        figure, axes = blank_axes(66 * 3 + 48, left=48, right=14, top=62, bottom=44)
        axes.set(xlim=(0.6, longest + 0.4), ylim=(-reach, reach))
        axes.set_xlabel("round, in the order of measuring", color=Colour.MUTED)
        axes.axhline(0, color=Colour.LINE, linewidth=1)
        ticks(axes.xaxis, 1, longest, logarithmic=False, whole=True)
        _percent_ticks(axes, reach)
        for (role, name, _), line in zip(rows, lines, strict=True):
            colour, marker, style = _STYLES[role]
            axes.plot(
                range(1, len(line) + 1), line, style, marker=marker, markersize=5.5 if longest <= 40 else 0,
                color=colour, linewidth=1.5, label=units.one_line(name, 34), markeredgewidth=0,
            )  # fmt: skip
        legend = figure.legend(
            loc="upper left", bbox_to_anchor=(0.02, 1.0), frameon=False, borderaxespad=0, labelspacing=0.25
        )
        for text in legend.get_texts():
            text.set(color=Colour.INK, parse_math=False)
        return to_svg(figure, f"Medians of {longest} interleaved rounds, relative to the middle round")


def _all_positive(latency: Latency) -> bool:
    return all(math.isfinite(time) and time > 0 for time in latency.rounds)


def classes_plot(classes: Sequence[ClassChange]) -> Markup | None:
    """Accuracy of each class before (hollow) and after (filled), one line per class, worst first."""
    if not classes:
        return None
    with drawing("tersor-classes"):
        figure, axes = blank_axes(20 * len(classes) + 48, left=132, right=52, top=6, bottom=42)
        shares = [share for change in classes for share in (change.before, change.after)]
        low, high = 10 * math.floor(10 * min(shares)), 10 * math.ceil(10 * max(shares))
        margin = 0.04 * max(high - low, 10)
        axes.set(xlim=(low - margin, max(high, low + 10) + margin), ylim=(len(classes) - 0.4, -0.6))
        axes.set_xlabel("accuracy of the class, %", color=Colour.MUTED)
        ticks(axes.xaxis, low, max(high, low + 10), logarithmic=False, whole=True)
        axes.grid(axis="x", color=Colour.LINE, linewidth=0.8)
        for row, change in enumerate(classes):
            _dumbbell(axes, row, change)
        return to_svg(figure, f"Accuracy before and after for {len(classes)} classes")


def _dumbbell(axes: Any, row: int, change: ClassChange) -> None:
    before, after = 100 * change.before, 100 * change.after
    colour = Colour.BAD if after < before else Colour.GOOD if after > before else Colour.MUTED
    axes.plot([before, after], [row, row], color=colour, linewidth=3, alpha=0.7, solid_capstyle="butt")
    axes.plot(before, row, "o", markersize=8, color=Colour.SURFACE, markeredgecolor=Colour.INK)
    axes.plot(after, row, "o", markersize=6, color=colour, markeredgecolor=colour)
    for place, side, text, ink in (
        (-0.03, "right", units.one_line(change.name, 16), Colour.INK),
        (1.03, "left", _points(after - before), colour),
    ):
        axes.text(
            place, row, text, transform=axes.get_yaxis_transform(), ha=side, va="center", color=ink,
            parse_math=False,
        )  # fmt: skip


def _points(change: float) -> str:
    text = f"{change:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _percent_ticks(axes: Any, reach: float) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [value for value in MaxNLocator(4).tick_values(-reach, reach) if abs(value) <= reach]
    axes.set_yticks(values, [f"{'+' if value > 0 else ''}{plain(value)} %" for value in values])
