"""The one table of legal step orders.

=========  ==================================================================================
after      may come
=========  ==================================================================================
(start)    prune, recover, quantize
prune      prune, recover, quantize
recover    prune, recover, quantize
quantize   prune, recover - but only if another quantize follows: whatever changes weights
           takes them off the integer grid, and the plan measured for them no longer holds
=========  ==================================================================================

So `prune -> recover -> quantize` (the default) and `quantize -> prune -> recover -> quantize` are legal;
`prune -> quantize -> recover` and `quantize -> quantize` are not. Quantization-aware training is a `quantize` that
trains by itself, from float weights: it comes instead of a post-training step, not after one.
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.core.step import Kind, Step
from tersor.errors import OrderError

LEGAL: dict[Kind | None, frozenset[Kind]] = {
    None: frozenset({"prune", "recover", "quantize"}),
    "prune": frozenset({"prune", "recover", "quantize"}),
    "recover": frozenset({"prune", "recover", "quantize"}),
    "quantize": frozenset({"prune", "recover"}),
}
REASONS: dict[tuple[Kind, Kind], str] = {
    ("quantize", "quantize"): "nothing changed since the last one, so it can only add rounding error; "
    "quantization-aware training starts from float weights and needs no quantization before it",
}


def check_order(steps: Sequence[Step]) -> None:
    """Raises `OrderError` with the reason if the steps stand in an order that cannot work."""
    previous: Kind | None = None
    for position, step in enumerate(steps):
        if step.kind not in LEGAL[previous]:
            reason = REASONS.get((previous, step.kind), "") if previous else ""
            raise OrderError(
                f"step {position + 1} ({step.name}) cannot follow step {position} ({steps[position - 1].name}): "
                f"{reason}"
            )
        previous = step.kind
    quantized = [position for position, step in enumerate(steps) if step.kind == "quantize"]
    if quantized and quantized[-1] != len(steps) - 1:
        late = steps[quantized[-1] + 1]
        raise OrderError(
            f"step {quantized[-1] + 2} ({late.name}) changes weights after the last quantize step "
            f"({steps[quantized[-1]].name}), so they would no longer lie on the integer grid that is deployed; "
            f"move {late.name} before it, or end the recipe with another quantize step"
        )
