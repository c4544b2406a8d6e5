"""Figures that live inside the page: colours are CSS variables, text stays text, bytes are repeatable."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from markupsafe import Markup, escape

WIDTH = 400


class Colour(StrEnum):
    """Stand-ins that matplotlib can draw with; each becomes the CSS variable of its name."""

    INK = "#a1f001"
    MUTED = "#a1f002"
    LINE = "#a1f003"
    SURFACE = "#a1f004"
    DEPLOYED = "#a1f005"
    RUNTIME = "#a1f006"
    EAGER = "#a1f007"
    GOOD = "#a1f008"
    BAD = "#a1f009"


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Draws with matplotlib's own defaults, whatever the user has configured, and with stable identifiers."""
    import matplotlib.style

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11}
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has the glyphs
        yield


def blank_axes(height: int, *, left: int, right: int, top: int, bottom: int, width: int = WIDTH) -> tuple[Any, Any]:
    """A figure of `width` by `height` pixels with one bare axes inside the given margins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.set_facecolor("none")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(Colour.LINE)
    axes.tick_params(colors=Colour.MUTED, length=0, pad=6)
    axes.set_yticks([])
    return figure, axes


def ticks(axis: Any, low: float, high: float, *, logarithmic: bool, whole: bool = False) -> None:
    """A few round tick values inside the range of one axis, written plainly."""
    from matplotlib.ticker import MaxNLocator

    values = _one_two_five(low, high) if logarithmic else []
    if len(values) < 3:
        values = list(MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high))
    inside = [value for value in values if low <= value <= high]
    axis.set_ticks(inside, [plain(value) for value in inside], parse_math=False)
    axis.set_ticks([], minor=True)


def _one_two_five(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]


def plain(value: float) -> str:
    """A round number as it stands at an axis."""
    return f"{value:g}".replace("-", "−")


def note(artist: Any, text: str, notes: list[str]) -> None:
    """Remembers what a reader is told who points at `artist`; `notes` goes to `to_svg`."""
    artist.set_gid(f"note-{len(notes)}")
    notes.append(text)


def to_svg(figure: Any, title: str, notes: Sequence[str] = ()) -> Markup:
    """The figure as an inline ``<svg>`` element with an accessible title, and a tooltip for each of its `notes`."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    body = text[text.index("<svg") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'<g id="note-(\d+)">', lambda found: f"<g><title>{escape(notes[int(found[1])])}</title>", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<[^<>]+>", lambda tag: _use_page_style(tag.group()), body)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    if view_box is None:  # pragma: no cover - matplotlib always writes one
        raise ValueError("expected matplotlib to write a viewBox into the SVG, got none")
    label = escape(title)
    opening = f'<svg viewBox="{view_box.group(1)}" role="img" aria-label="{label}"><title>{label}</title>'
    content = re.sub(r"\n\s*", "\n", body[body.index(">") + 1 :])
    return Markup(opening + content + "</svg>")  # noqa: S704 - matplotlib has escaped the texts


def _use_page_style(tag: str) -> str:
    """Takes the font from the page and the colours from its variables."""
    for colour in Colour:
        tag = tag.replace(colour.value, f"var(--{colour.name.lower()})")
    return re.sub(r"font(?:-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", _font_size, tag)


def _font_size(match: re.Match[str]) -> str:
    return f"font-size: {match.group(1).strip()}" if match.group(1) else "font-family: inherit"
