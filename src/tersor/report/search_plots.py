"""The figures of a search: the front, its history, and predictions against measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from markupsafe import Markup

from tersor.core.search import TrialRecord
from tersor.report import units
from tersor.report.search import Found
from tersor.report.search_maps import ROWS_DRAWN, costs_plot, damages_plot
from tersor.report.svg import Colour, blank_axes, drawing, note, ticks, to_svg

FRONT_WIDTH = 820
BUDGETS_SHOWN = 4  # drops beyond so many budgets are drawn at the upper edge, or they would flatten all others
NUMBERED = 16
_RUNG_MARKERS = ("o", "s", "D", "P")


class Place(NamedTuple):
    """One prediction and its measurement."""

    said: float
    seen: float
    told: str


class Series(NamedTuple):
    """Predictions of one kind."""

    label: str
    marker: str
    fill: Colour
    edge: Colour
    places: list[Place]


class SearchPlots(NamedTuple):
    """All figures of a search, and how much they leave out."""

    front: Markup | None
    history: Markup | None
    latencies: Markup | None
    drops: Markup | None
    costs: Markup | None
    damages: Markup | None
    layers_left_out: int
    decisions_left_out: int


def drawn(found: Found) -> SearchPlots:
    """Draws a search."""
    costs, damages = found.record.costs, found.record.damages
    return SearchPlots(
        front=front_plot(found),
        history=history_plot(found),
        latencies=latencies_plot(found),
        drops=drops_plot(found),
        costs=costs_plot(costs),
        damages=damages_plot(damages),
        layers_left_out=max(0, len({name for cost in costs for name in cost.layers}) - ROWS_DRAWN),
        decisions_left_out=max(0, (len(damages.rows) if damages else 0) - ROWS_DRAWN),
    )


def front_plot(found: Found) -> Markup | None:
    """Drop on the search split over latency on the target: all trials by rung, the front, baselines and budget."""
    trials = found.measured
    if not trials:
        return None
    scale = 100 if units.is_share(found.metric) else 1
    lines = [(found.baseline_ms, "uncompressed, same runtime", Colour.RUNTIME, "--", 1.015),
             (found.eager_ms, "PyTorch eager", Colour.EAGER, ":", 1.075)]  # fmt: skip
    known = [ms for ms, *_ in lines if ms is not None]
    low, high = _range([*(trial.latency_ms or 0 for trial in trials), *known], logarithmic=True)
    drops = [scale * (trial.drop or 0.0) for trial in trials]
    floor, ceiling, clipped = _drop_range(drops, None if found.max_drop is None else scale * found.max_drop)
    notes: list[str] = []
    with drawing("tersor-front"):
        figure, axes = blank_axes(400, left=56, right=112, top=74, bottom=44, width=FRONT_WIDTH)
        axes.set_xscale("log")
        axes.set(xlim=(low, high), ylim=(floor, ceiling))
        axes.set_xlabel("milliseconds per call on the target, logarithmic", color=Colour.MUTED)
        axes.set_ylabel(f"drop in {units.metric_unit(found.metric)}", color=Colour.MUTED, parse_math=False)
        ticks(axes.xaxis, low, high, logarithmic=True)
        ticks(axes.yaxis, floor, ceiling, logarithmic=False)
        axes.axhline(0, color=Colour.LINE, linewidth=1)
        for ms, name, colour, style, height in lines:
            if ms is not None:
                axes.axvline(ms, color=colour, linewidth=1.5, linestyle=style, zorder=1)
                _above(axes, ms, height, f"{name} {units.milliseconds(ms)}", colour)
        if found.max_drop is not None:
            axes.axhspan(floor, scale * found.max_drop, color=Colour.GOOD, alpha=0.07, linewidth=0)
            axes.axhline(scale * found.max_drop, color=Colour.GOOD, linewidth=1.5, linestyle=(0, (4, 2)), zorder=1)
            _beside(axes, scale * found.max_drop, f"budget {units.exact_difference(found.max_drop, found.metric)}")
        _steps(axes, [(trial.latency_ms or 0, min(scale * (trial.drop or 0), clipped)) for trial in found.front], high)
        for trial, drop in zip(trials, drops, strict=True):
            _trial(axes, trial, min(drop, clipped), found, notes, beyond=drop > clipped)
        _rungs(axes, found)
        _legend(figure, left=0.056)
        spoken = f"{len(trials)} trials, {len(found.front)} on the front"
        return to_svg(figure, f"Drop over latency: {spoken}", notes)


def _drop_range(drops: Sequence[float], budget: float | None) -> tuple[float, float, float]:
    """Lower and upper end of the axis, and the height at which what lies beyond is drawn."""
    low, high = min(0.0, *drops, budget or 0.0), max(0.0, *drops, budget or 0.0)
    if budget:
        high = min(high, max(BUDGETS_SHOWN * budget, 2 * min(drops)))
    span = (high - low) or 1.0
    return low - 0.08 * span, high + 0.1 * span, high


def _range(values: Sequence[float], *, logarithmic: bool) -> tuple[float, float]:
    """The ends of an axis that holds all values, with some room."""
    low, high = min(values), max(values)
    if logarithmic:
        room = max((high / low) ** 0.05, 1.02)
        return low / room, high * room
    span = (high - low) or abs(high) or 1.0
    return low - 0.06 * span, high + 0.06 * span


def _above(axes: Any, position: float, height: float, text: str, colour: Colour) -> None:
    """Writes above the axes at `position`, turned inwards near the right edge."""
    side = "right" if axes.transAxes.inverted().transform(axes.transData.transform((position, 0)))[0] > 0.7 else "left"
    axes.text(
        position, height, text, transform=axes.get_xaxis_transform(), color=colour, ha=side, weight="bold", size=10,
        parse_math=False,
    )  # fmt: skip


def _beside(axes: Any, height: float, text: str) -> None:
    axes.text(
        1.01, height, text, transform=axes.get_yaxis_transform(), color=Colour.GOOD, va="center", weight="bold",
        size=10, parse_math=False,
    )  # fmt: skip


def _steps(axes: Any, stairs: Sequence[tuple[float, float]], end: float) -> None:
    """The front: between two of its points the slower one's drop cannot be had yet."""
    if stairs:
        x, y = [*(point[0] for point in stairs), end], [*(point[1] for point in stairs), stairs[-1][1]]
        axes.plot(x, y, drawstyle="steps-post", color=Colour.DEPLOYED, linewidth=1.5, alpha=0.6, zorder=2)


def _trial(axes: Any, trial: TrialRecord, drop: float, found: Found, notes: list[str], *, beyond: bool) -> None:
    style = _rung_style(trial.rung)
    if beyond:
        style |= {"marker": "^"}
    (point,) = axes.plot([trial.latency_ms], [drop], zorder=4 + trial.rung, clip_on=False, **style)
    note(point, found.told(trial), notes)
    chosen = trial is found.chosen
    if chosen:
        axes.plot([trial.latency_ms], [drop], "o", markersize=18, color="none", markeredgecolor=Colour.INK,
                  markeredgewidth=1.8, zorder=3, clip_on=False)  # fmt: skip
    if chosen or (trial.number in found.record.front and len(found.front) <= NUMBERED):
        axes.annotate(
            f"{trial.number}, chosen" if chosen else str(trial.number), (trial.latency_ms, drop),
            xytext=(11 if chosen else 6, 6), textcoords="offset points", size=10, parse_math=False,
            color=Colour.INK if chosen else Colour.MUTED, weight="bold" if chosen else "normal",
        )  # fmt: skip


def _rung_style(rung: int) -> dict[str, Any]:
    """Hollow for the shortest training; each longer one has a sign of its own."""
    return {
        "marker": _RUNG_MARKERS[min(max(rung, 0), len(_RUNG_MARKERS) - 1)],
        "markersize": 7 if rung <= 0 else 8,
        "color": Colour.SURFACE if rung <= 0 else Colour.DEPLOYED,
        "markeredgecolor": Colour.DEPLOYED,
        "linestyle": "none",
    }


def _rungs(axes: Any, found: Found) -> None:
    rungs = sorted({trial.rung for trial in found.measured})
    for rung in rungs:
        which = " (shortest training)" if rung == 0 and len(rungs) > 1 else ""
        axes.plot([], [], label=f"rung {rung}{which}", **_rung_style(rung))
    if found.front:
        axes.plot([], [], color=Colour.DEPLOYED, linewidth=1.5, alpha=0.6, label="front")


def _legend(figure: Any, *, left: float, columns: int = 6) -> None:
    legend = figure.legend(
        loc="upper left", bbox_to_anchor=(left, 1.0), frameon=False, borderaxespad=0, labelspacing=0.25,
        ncols=columns, columnspacing=1.4, handletextpad=0.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set(color=Colour.INK, parse_math=False)


def history_plot(found: Found) -> Markup | None:
    """The best latency so far over the trials, of those inside the budget and of those that the ladder certified."""
    if found.max_drop is None or not found.measured:
        return None
    baseline = found.baseline_ms
    times = {trial.number: trial.latency_ms or 0.0 for trial in found.measured}
    inside = {trial.number for trial in found.measured if found.feasible(trial)}
    certified = {number for number, step in found.ladder.items() if step.certified}
    low, high = _range([*times.values(), *([baseline] if baseline else [])], logarithmic=False)
    floor, numbers = low - 0.08 * (high - low), [trial.number for trial in found.record.trials]
    notes: list[str] = []
    with drawing("tersor-search-history"):
        figure, axes = blank_axes(270, left=46, right=14, top=44, bottom=44)
        axes.set(xlim=(0.4, len(numbers) + 0.6), ylim=(floor, high))
        axes.set_xlabel("trials, in the order in which they were asked for", color=Colour.MUTED)
        axes.set_ylabel("milliseconds per call", color=Colour.MUTED)
        ticks(axes.xaxis, 1, len(numbers), logarithmic=False, whole=True)
        ticks(axes.yaxis, low, high, logarithmic=False)
        if baseline is not None:
            axes.axhline(baseline, color=Colour.RUNTIME, linewidth=1.5, linestyle="--", zorder=1)
        for at, trial in enumerate(found.record.trials, 1):
            if trial.number in times:
                fill, edge = (Colour.DEPLOYED,) * 2 if trial.number in inside else (Colour.SURFACE, Colour.MUTED)
                style: dict[str, Any] = {"marker": "o", "markersize": 6, "color": fill, "markeredgecolor": edge}
            else:
                style = {"marker": "x", "markersize": 7, "color": Colour.BAD}
            (point,) = axes.plot([at], [times.get(trial.number, floor)], zorder=3, clip_on=False, **style)
            note(point, found.told(trial), notes)
        for colour, label, counts in (
            (Colour.DEPLOYED, "best inside the budget on the search split", inside),
            (Colour.GOOD, "best of those that were certified in the end", certified),
        ):
            _best(axes, [times.get(n, math.inf) if n in counts else math.inf for n in numbers], colour, label)
        _legend(figure, left=0.02, columns=1)
        return to_svg(figure, f"Best latency so far over {len(numbers)} trials", notes)


def _best(axes: Any, times: Sequence[float], colour: Colour, label: str) -> None:
    """The smallest so far, as stairs."""
    so_far = list(accumulate(times, min))
    first = next((at for at, ms in enumerate(so_far) if math.isfinite(ms)), None)
    if first is not None:
        x, y = [*range(first + 1, len(so_far) + 1), len(so_far) + 0.6], [*so_far[first:], so_far[-1]]
        dashes = "-" if colour is Colour.GOOD else (0, (5, 1.5))
        axes.plot(x, y, drawstyle="steps-post", color=colour, linewidth=2, linestyle=dashes, label=label)


def latencies_plot(found: Found) -> Markup | None:
    """Predicted over measured latency: points that a table was fitted on, points that it was not, trials."""
    points = [point for cost in found.record.costs for point in cost.points]
    fitted, unfitted = (
        [
            Place(point.predicted_ms, point.measured_ms, found.summary(point.choice))
            for point in points
            if point.fitted is side and units.known(point.predicted_ms) and units.known(point.measured_ms)
        ]
        for side in (True, False)
    )
    trials = [
        Place(trial.predicted_ms or 0.0, trial.latency_ms or 0.0, found.told(trial).partition("\n")[0])
        for trial in found.trials_apart
    ]
    series = [
        Series("fitted on", "o", Colour.SURFACE, Colour.EAGER, fitted),
        Series("predicted before", "s", Colour.RUNTIME, Colour.SURFACE, unfitted),
        Series("trials", "D", Colour.DEPLOYED, Colour.SURFACE, trials),
    ]
    return _scatter("tersor-predicted-ms", series, "milliseconds", units.milliseconds)


def drops_plot(found: Found) -> Markup | None:
    """Predicted over measured drop of the trials."""
    scale = 100 if units.is_share(found.metric) else 1
    places = [
        Place(scale * trial.predicted_drop, scale * trial.drop, found.told(trial).partition("\n")[0])
        for trial in found.measured
        if trial.drop is not None and trial.predicted_drop is not None and units.known(trial.predicted_drop)
    ]
    series = [Series("trials", "D", Colour.DEPLOYED, Colour.SURFACE, places)]
    unit = units.metric_unit(found.metric)
    return _scatter("tersor-predicted-drop", series, unit, lambda drop: found.drop(drop / scale))


def _scatter(salt: str, series: Sequence[Series], unit: str, written: Callable[[float], str]) -> Markup | None:
    """Predictions over measurements, with the line on which both are equal."""
    places = [place for one in series for place in one.places]
    if not places:
        return None
    low, high = _range([value for place in places for value in (place.said, place.seen)], logarithmic=False)
    notes: list[str] = []
    with drawing(salt):
        figure, axes = blank_axes(320, left=56, right=14, top=30 if len(series) > 1 else 8, bottom=44)
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.set_xlabel(f"measured, {unit}", color=Colour.MUTED, parse_math=False)
        axes.set_ylabel(f"predicted, {unit}", color=Colour.MUTED, parse_math=False)
        for axis in (axes.xaxis, axes.yaxis):
            ticks(axis, low, high, logarithmic=False)
        axes.plot([low, high], [low, high], color=Colour.LINE, linewidth=1.5, zorder=1)
        for one in series:
            style = {"marker": one.marker, "color": one.fill, "markeredgecolor": one.edge, "markersize": 7}
            for place in one.places:
                (point,) = axes.plot([place.seen], [place.said], linestyle="none", clip_on=False, **style)
                note(point, f"{place.told}\npredicted {written(place.said)}, measured {written(place.seen)}", notes)
            if one.places and len(series) > 1:
                axes.plot([], [], linestyle="none", label=one.label, **style)
        if len(series) > 1:
            _legend(figure, left=0.02)
        return to_svg(figure, f"Predicted and measured, {unit}: {len(places)} points", notes)
