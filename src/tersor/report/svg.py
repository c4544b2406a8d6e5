"""Figures that live inside the page: colours are CSS variables, text stays text, bytes are repeatable."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
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


def blank_axes(height: int, *, left: int, right: int, top: int, bottom: int) -> tuple[Any, Any]:
    """A figure of `WIDTH` by `height` pixels with one bare axes inside the given margins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height))
    axes.set_facecolor("none")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(Colour.LINE)
    axes.tick_params(colors=Colour.MUTED, length=0, pad=6)
    axes.set_yticks([])
    return figure, axes


def to_svg(figure: Any, title: str) -> Markup:
    """The figure as an inline ``<svg>`` element with an accessible title."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    body = text[text.index("<svg") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", body, flags=re.S)
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
