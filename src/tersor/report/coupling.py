"""A picture of what goes together: families of units as rows, layers as columns, and how much of each family stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from tersor.core.report import Pruning
from tersor.graph import Coupling
from tersor.report import units

ROWS_SHOWN = 120
NAMED_COLUMNS = 48  # more column names would overlap
WIDTH, LABELS, BARS, NUMBERS = 900, 210, 90, 86
GAP = 12
_COLOURS = {"ink": "#1d2126", "muted": "#5c646e", "line": "#dfe1dd", "deployed": "#0072b2", "eager": "#767d86"}


class Row(NamedTuple):
    """One family, or all that is frozen: which layers it touches; `kept` is None where nothing was decided."""

    name: str
    kind: str
    units: int | None
    kept: int | None
    layers: Sequence[str]


def coupling_plot(pruning: Pruning) -> Markup | None:
    """Families and layers of one pruning as an inline ``<svg>``; None if there is nothing to draw."""
    rows = [Row(item.name, item.kind, item.units, item.kept, item.layers) for item in pruning.families]
    return _plot(rows, [_layer_of(item.name) for item in pruning.frozen], pruning.layers, inline=True)


def draw_coupling(coupling: Coupling) -> Markup | None:
    """What can be cut of a model, as an SVG of its own, ready to be written to a file."""
    places = [(family, [_layer_of(str(place)) for place in family.members]) for family in coupling.families]
    rows = [Row(family.name, family.kind, family.size, None, layers) for family, layers in places]
    frozen = [_layer_of(item.name) for item in coupling.frozen]
    layers = [layer for _, touched in places for layer in touched]
    return _plot(rows, frozen, list(dict.fromkeys([*layers, *frozen])), inline=False)


def _layer_of(place: str) -> str:
    """`block.conv.weight[0]` -> `block.conv`."""
    return place.partition("[")[0].rpartition(".")[0]


def _plot(rows: Sequence[Row], frozen: Sequence[str], layers: Sequence[str], *, inline: bool) -> Markup | None:
    columns = {layer: position for position, layer in enumerate(layers)}
    if not rows or not columns:
        return None
    shown = list(rows[:ROWS_SHOWN])
    known = [layer for layer in dict.fromkeys(frozen) if layer in columns]
    if known:
        shown.append(Row("frozen", "part", None, None, known))
    height = 16 if len(shown) <= 40 else 12
    top = 96 if len(columns) <= NAMED_COLUMNS else 24
    grid = _Grid(top, height, (WIDTH - LABELS - BARS - NUMBERS - 2 * GAP) / len(columns), columns)
    parts = [*grid.header(layers), *(grid.row(number, row) for number, row in enumerate(shown))]
    title = f"{len(rows)} families of units and the {len(columns)} layers that they touch"
    space = "" if inline else ' xmlns="http://www.w3.org/2000/svg"'
    opening = (
        f'<svg{space} viewBox="0 0 {WIDTH} {top + height * len(shown) + 4}" role="img" aria-label="{title}">'
        f"<title>{title}</title>"
    )
    return Markup(opening + "".join(parts) + "</svg>")  # noqa: S704 - every text is escaped by `_text`


class _Grid:
    """Where things stand."""

    def __init__(self, top: int, height: int, width: float, columns: dict[str, int]) -> None:
        self.top, self.height, self.width, self.columns = top, height, width, columns
        self.size = 11 if height > 12 else 9.5
        self.right = LABELS + GAP + width * len(columns) + GAP

    def header(self, layers: Sequence[str]) -> list[str]:
        if len(layers) > NAMED_COLUMNS:
            middle = LABELS + GAP
            return [_text(middle, self.top - 8, f"{len(layers)} layers, in the order of the model →", size=11)]
        found = []
        for layer, position in self.columns.items():
            x, y = LABELS + GAP + self.width * (position + 0.5), self.top - 5
            turned = f' transform="rotate(-55 {x:.1f} {y})"'
            found.append(_text(x, y, units.ending(layer or "(model)", 20), size=10, more=turned))
        return found

    def row(self, number: int, row: Row) -> str:
        y = self.top + number * self.height
        middle = y + self.height * 0.72
        told = f"{row.name}: touches {len(set(row.layers))} layers"
        parts = [
            _rectangle(LABELS + GAP, y, self.width * len(self.columns), self.height - 1.5, "line", opacity=0.35),
            _text(LABELS, middle, units.ending(row.name, 34), size=self.size, anchor="end", colour="ink"),
        ]
        numbers = sorted({self.columns[layer] for layer in row.layers if layer in self.columns})
        colour = "eager" if row.units is None else "deployed"
        parts += [
            _rectangle(LABELS + GAP + self.width * first, y, self.width * count - self._gap, self.height - 1.5, colour)
            for first, count in _runs(numbers, joined=len(self.columns) > NAMED_COLUMNS)
        ]
        if row.units is not None and row.kept is not None:
            told = f"{row.name}: {row.kept} of {row.units} {row.kind}s stay; touches {len(set(row.layers))} layers"
            share = row.kept / max(1, row.units)
            parts.append(_rectangle(self.right, y + 2, BARS, self.height - 5.5, "line"))
            parts.append(_rectangle(self.right, y + 2, BARS * share, self.height - 5.5, "deployed"))
        if row.units is not None:
            amount = units.integer(row.units) if row.kept is None else f"{row.kept:,} / {row.units:,}"
            parts.append(_text(self.right + BARS + 8, middle, amount, size=self.size))
        return f"<g><title>{escape(units.one_line(told))}</title>{''.join(parts)}</g>"

    @property
    def _gap(self) -> float:
        return 1.5 if len(self.columns) <= NAMED_COLUMNS else 0.0


def _runs(numbers: Sequence[int], *, joined: bool) -> list[tuple[int, int]]:
    """Each cell by itself, or neighbours as one: `(first, count)`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if joined and found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def _paint(colour: str) -> str:
    return f"fill:var(--{colour},{_COLOURS[colour]})"


def _rectangle(x: float, y: float, width: float, height: float, colour: str, *, opacity: float = 1) -> str:
    faded = f";opacity:{opacity}" if opacity < 1 else ""
    size = f'width="{max(width, 0.5):.2f}" height="{height:.1f}"'
    return f'<rect x="{x:.2f}" y="{y:.1f}" {size} style="{_paint(colour)}{faded}"/>'


def _text(
    x: float, y: float, text: str, *, size: float, anchor: str = "start", colour: str = "muted", more: str = ""
) -> str:
    style = f"font-size:{size}px;text-anchor:{anchor};{_paint(colour)}"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}"{more}>{escape(text)}</text>'
