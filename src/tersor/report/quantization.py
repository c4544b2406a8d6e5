"""What the page says about widths: one part for each step that rounds, and a picture of bits and sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tersor.core.report import QuantizationRecord, QuantizedLayer, Report
from tersor.report import units
from tersor.report.svg import Colour, blank_axes, drawing, to_svg

LAYERS_DRAWN = 60
ROW_HEIGHT = 17
FLOAT = 32
BITS_SHARE = 0.42  # of the width; the rest is for the losses


class WidthsPart(NamedTuple):
    """One step, ready to be shown."""

    step: str
    record: QuantizationRecord
    layers: list[QuantizedLayer]
    plot: Markup | None


def widths(report: Report) -> list[WidthsPart]:
    """The steps of a run that round layer by layer, in order; where it was measured the most sensitive layer first."""
    return [
        WidthsPart(step.name, step.quantization, ranked(step.quantization), widths_plot(step.quantization))
        for step in report.history
        if step.quantization is not None
    ]


def ranked(record: QuantizationRecord) -> list[QuantizedLayer]:
    """Layers, those that lose most at the smallest width first; those that were not measured last, in their order."""
    return sorted(record.layers, key=lambda layer: -layer.losses[0] if layer.losses else math.inf)


def widths_plot(record: QuantizationRecord) -> Markup | None:
    """Bits of every layer as bars, and on the right what it loses at the smallest width, on a logarithmic scale."""
    layers = ranked(record)[:LAYERS_DRAWN]
    if not layers:
        return None
    losses = [layer.losses[0] for layer in layers if layer.losses and units.known(layer.losses[0])]
    positive = [loss for loss in losses if loss > 0]
    with drawing("tersor-widths"):
        figure, axes = blank_axes(ROW_HEIGHT * len(layers) + 30, left=150, right=62, top=26, bottom=4)
        axes.spines["bottom"].set_visible(False)
        axes.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5))
        axes.set_xticks([])
        _heads(axes, record, measured=bool(losses))
        for row, layer in enumerate(layers):
            _row(axes, row, layer, positive)
        return to_svg(figure, f"Bits and sensitivity of {len(layers)} layers")


def _heads(axes: Any, record: QuantizationRecord, *, measured: bool) -> None:
    heads = [(0.0, "bits")]
    if measured and record.widths:
        heads.append((BITS_SHARE + 0.06, f"lost at {record.widths[0]} bits"))
    for place, text in heads:
        axes.text(
            place, 1.0, text, transform=axes.transAxes, va="bottom", color=Colour.MUTED, size=10, parse_math=False,
        )  # fmt: skip


def _row(axes: Any, row: int, layer: QuantizedLayer, positive: Sequence[float]) -> None:
    exact = layer.weight_bits >= FLOAT
    share = BITS_SHARE * (0.8 if exact else 0.7 * layer.weight_bits / 8)
    axes.barh(row, share, height=0.7, color=Colour.EAGER if exact else Colour.DEPLOYED, linewidth=0)
    _text(axes, -0.03, row, units.one_line(layer.name or "(model)", 22), side="right")
    _text(axes, share + 0.01, row, "float" if exact else str(layer.weight_bits), side="left")
    if layer.losses:
        start = BITS_SHARE + 0.06
        axes.barh(
            row, (1 - start) * _place(layer.losses[0], positive), left=start, height=0.7, color=Colour.BAD,
            alpha=0.6, linewidth=0,
        )  # fmt: skip
        _text(axes, 1.02, row, units.significant(layer.losses[0], 2), side="left")


def _place(loss: float, positive: Sequence[float]) -> float:
    """A loss between the smallest and the largest, in 0.04..1."""
    if not units.known(loss):
        return 1.0
    if loss <= 0 or not positive:
        return 0.0
    low, high = math.log(min(positive)), math.log(max(positive))
    return 0.04 + 0.96 * ((math.log(loss) - low) / (high - low) if high > low else 1.0)


def _text(axes: Any, place: float, row: int, text: str, *, side: str) -> None:
    axes.text(place, row, text, ha=side, va="center", color=Colour.INK, size=9.5, parse_math=False)
