"""What each operator does to labels: one table, which callers may extend."""

from __future__ import annotations

from tersor.graph.coupling.rules import indexing, linear, norm, pieces, pointwise, shape
from tersor.graph.coupling.rules.pointwise import fallback
from tersor.graph.coupling.trace import Rule

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **linear.RULES,
    **norm.RULES,
    **shape.RULES,
    **pieces.RULES,
    **indexing.RULES,
}

__all__ = ["RULES", "fallback"]
