"""Turns the frozen report into an offline page, a model card and a table for the terminal."""

from tersor.report.card import render_card
from tersor.report.coupling import draw_coupling
from tersor.report.html import render_html
from tersor.report.table import render_table

__all__ = ["draw_coupling", "render_card", "render_html", "render_table"]
