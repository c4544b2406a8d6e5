"""Finds where two versions of a graph begin to disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

Values = dict[str, np.ndarray[Any, Any]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64; Inf if shapes differ or a value is not finite."""
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    norm = float(expected.double().norm())
    difference = float((actual.double() - expected.double()).norm())
    return difference / norm if norm > 0 else difference


def first_divergence(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    values_of: Callable[[Sequence[str]], Values],
    tolerance: float,
) -> tuple[str, str, float] | None:
    """The first value, in execution order, that differs by more than `tolerance`.

    Args:
        graph_module: The reference; its nodes' names identify the values.
        inputs: By position.
        values_of: Gives the other version's values for those of the names that it knows.
        tolerance: Largest acceptable relative error.

    Returns:
        Node name, path of the module it belongs to (of what it was made from, where a function made it), relative
        error; None if none differs.
    """
    expected = _Recorder(graph_module)
    with torch.no_grad():
        expected.run(*inputs)
    actual = values_of(list(expected.values))
    for name, (reference, module) in expected.values.items():
        if name in actual:
            error = relative_error(torch.from_numpy(np.asarray(actual[name])), reference)
            if error > tolerance:
                return name, module, error
    return None


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every floating-point value that an operator computes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, tuple[Tensor, str]] = {}
        self.modules: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        # Nodes compare by their place in the graph: the last of the inputs is what was computed last.
        inherited = [self.modules[node] for node in sorted(n.all_input_nodes) if self.modules[node]]
        self.modules[n] = n.meta.get("module") or (inherited[-1] if inherited else "")
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name] = (result.detach().clone(), self.modules[n])
        return result
