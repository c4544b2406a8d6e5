"""The two tables that a search chooses by, as heat maps: what layers cost, and what decisions do alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from tersor.core.search import CostRecord, DamageRecord, DamageRow
from tersor.report import units
from tersor.report.svg import Colour, blank_axes, drawing, note, ticks, to_svg

ROWS_DRAWN = 60
ROW_HEIGHT = 17
PALEST, DARKEST = 0.06, 0.75
_LABELS, _NUMBERS, _HEAD, _FOOT = 158, 62, 26, 42
_FEWEST_COLUMNS = 2


def costs_plot(costs: Sequence[CostRecord]) -> Markup | None:
    """Milliseconds of each layer while it is whole: layers as rows, number formats as columns."""
    layers = costly(costs)
    if not layers:
        return None
    most = max((value for cost in costs for value in cost.layers.values() if units.known(value)), default=0.0)
    columns = max(len(costs), _FEWEST_COLUMNS)
    notes: list[str] = []
    with drawing("tersor-costs"):
        figure, axes = blank_axes(ROW_HEIGHT * len(layers) + _HEAD + 4, left=_LABELS, right=8, top=_HEAD, bottom=4)
        _rows(axes, len(layers), width=columns)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        for column, cost in enumerate(costs):
            _head(axes, column + 0.5, units.one_line(cost.format, 14), side="center")
            for row, layer in enumerate(layers):
                value = cost.layers.get(layer)
                told = f"{units.one_line(layer)}: {units.milliseconds(value)} in {units.one_line(cost.format, 40)}"
                shade = _share(value or 0.0, 0.0, most)
                _cell(axes, row, (column, column + 0.97), Colour.DEPLOYED, shade, notes, told)
                _write(axes, column + 0.485, row, units.significant(value, 2), side="center")
        for row, layer in enumerate(layers):
            _name(axes, row, layer)
        return to_svg(figure, f"Milliseconds of {len(layers)} layers", notes)


def costly(costs: Sequence[CostRecord]) -> list[str]:
    """The layers that are drawn, in the order of the model: the dearest, where there are too many."""
    names = list(dict.fromkeys(name for cost in costs for name in cost.layers))
    dearest = sorted(names, key=lambda name: -max(_amount(cost.layers.get(name)) for cost in costs))[:ROWS_DRAWN]
    return [name for name in names if name in set(dearest)]


def damages_plot(damages: DamageRecord | None) -> Markup | None:
    """What each decision does alone: decisions as rows, the share of their units that goes as columns."""
    rows = harmful(damages)
    if damages is None or not rows:
        return None
    values = [value for row in damages.rows for value in row.damages if units.known(value) and value > 0]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
    notes: list[str] = []
    with drawing("tersor-damages"):
        height = ROW_HEIGHT * len(rows) + _HEAD + _FOOT
        figure, axes = blank_axes(height, left=_LABELS, right=_NUMBERS, top=_HEAD, bottom=_FOOT)
        _rows(axes, len(rows), width=100)
        axes.set_xlabel("share of its units that goes, %", color=Colour.MUTED)
        ticks(axes.xaxis, 0, 100, logarithmic=False, whole=True)
        _head(axes, 102, "at most", side="left")
        for number, row in enumerate(rows):
            _name(axes, number, row.name)
            for (start, end), kept, damage in _cells(row):
                told = f"{units.one_line(row.name)}: {_staying(row, kept)}, {units.significant(damage, 2)}"
                good = damage <= 0
                shade = 0.0 if good else 1.0 if math.isinf(damage) else _share(math.log(damage), low, high)
                _cell(axes, number, (start, end), Colour.GOOD if good else Colour.BAD, shade, notes, told)
            strongest = max(row.damages, default=math.nan)
            _write(axes, 102, number, "∞" if math.isinf(strongest) else units.significant(strongest, 2), side="left")
        return to_svg(figure, f"Damage of {len(rows)} decisions", notes)


def harmful(damages: DamageRecord | None) -> list[DamageRow]:
    """The decisions that are drawn, in the order of the model."""
    return [row for row in damages.rows if len(row.options) > 1][:ROWS_DRAWN] if damages else []


def _cells(row: DamageRow) -> list[tuple[tuple[float, float], int, float]]:
    """From one option to the next: where the cell stands, in percent, units that stay, and the damage."""
    gone = [100 * (1 - option / row.options[0]) if row.options[0] else 100.0 for option in row.options]
    found = zip(pairwise(gone), row.options[1:], row.damages[1:], strict=False)
    return [(place, kept, damage) for place, kept, damage in found if not math.isnan(damage)]


def _staying(row: DamageRow, kept: int) -> str:
    if row.kind == "block":
        return "the block goes"
    return f"{units.integer(kept)} of {units.integer(row.options[0])} units stay"


def _amount(value: float | None) -> float:
    return value if value is not None and units.known(value) else 0.0


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, in 0..1."""
    if not units.known(value):
        return 0.0
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 1.0


def _rows(axes: Any, rows: int, *, width: float) -> None:
    axes.set(xlim=(0, width), ylim=(rows - 0.5, -0.5))


def _cell(
    axes: Any, row: int, span: tuple[float, float], colour: Colour, shade: float, notes: list[str], told: str
) -> None:
    """One coloured cell; the strength says where its value lies between the least and the most."""
    (cell,) = axes.barh(
        row, span[1] - span[0], left=span[0], height=0.86, color=colour, linewidth=0,
        alpha=PALEST + (DARKEST - PALEST) * shade,
    )  # fmt: skip
    note(cell, told, notes)


def _head(axes: Any, place: float, text: str, *, side: str) -> None:
    axes.text(
        place, 1.0, text, transform=axes.get_xaxis_transform(), va="bottom", ha=side, color=Colour.MUTED, size=10,
        parse_math=False,
    )  # fmt: skip


def _name(axes: Any, row: int, name: str) -> None:
    axes.text(
        -0.03, row, units.ending(name or "(model)", 24), transform=axes.get_yaxis_transform(), ha="right", va="center",
        color=Colour.INK, size=9.5, parse_math=False,
    )  # fmt: skip


def _write(axes: Any, place: float, row: int, text: str, *, side: str) -> None:
    axes.text(place, row, text, ha=side, va="center", color=Colour.INK, size=9.5, parse_math=False)
