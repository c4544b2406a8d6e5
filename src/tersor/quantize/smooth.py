"""SmoothQuant: moves the outliers of activations into the weights behind them.

``x / s`` and ``W · s`` with ``s = max|x|^α / max|W|^(1 − α)`` per channel. The division goes into the LayerNorm, the
RMSNorm's scale or the layer that gives `x`, so that nothing is computed in addition; where `x` has other readers
too, it cannot. Xiao et al. 2023, https://arxiv.org/abs/2211.10438.

Shapes: `C` channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.stream import Stream, varying
from tersor.quantize.equalize import column_peaks, owns_its_weight, passes, scale_columns, scale_rows
from tersor.quantize.prepare import Batches

_aten = torch.ops.aten
_NORMS: dict[object, slice[int, int, None]] = {
    _aten.layer_norm.default: slice(2, 4),
    _aten.rms_norm.default: slice(2, 3),
}  # scale and shift
_LIMIT = 1e4


@dataclass(frozen=True)
class Place:
    """Values with outliers: what makes them, and the layers that read them, nobody else."""

    giver: fx.Node
    value: fx.Node
    readers: list[fx.Node]


def smooth(graph_module: fx.GraphModule, units: dict[str, Tensor], batches: Batches, alpha: float) -> int:
    """Smooths wherever it is exact, in place.

    Args:
        graph_module: Nothing is rounded yet.
        units: What the stored weights were multiplied by, by path; kept up to date.
        batches: Examples that show the outliers.
        alpha: 1 evens out the activations alone, 0 the weights alone; 0.5 shares the trouble.

    Returns:
        At how many places.
    """
    where = places(graph_module)
    stream = Stream(graph_module, [tuple(batch.tensors().values()) for batch in batches()])
    with torch.no_grad():  # all before any change: the run holds values of the graph as it was
        found = [torch.stack([_peaks(value) for value in stream.advance(place.value)]).amax(0) for place in where]
    for place, peaks in zip(where, found, strict=True):
        weights = torch.stack([column_peaks(graph_module, reader) for reader in place.readers]).amax(0)
        factor = peaks**alpha / weights ** (1 - alpha)
        usable = torch.isfinite(factor) & (factor < _LIMIT) & (factor > 1 / _LIMIT)
        factor = torch.where(usable, factor, 1.0)
        divide(graph_module, units, place.giver, factor)
        for reader in place.readers:
            scale_columns(graph_module, units, reader, factor)
    return len(where)


def _peaks(value: Tensor) -> Tensor:
    """Largest magnitude of each channel, `[C]`."""
    return value.reshape(-1, value.shape[-1]).abs().amax(0)


def places(graph_module: fx.GraphModule) -> list[Place]:
    """Where values can be divided, channel by channel, with nothing to compute in addition."""
    found = []
    for giver in varying(graph_module):
        if not _can_be_divided(giver):
            continue
        value = giver
        while owns_its_weight(giver) and len(value.users) == 1 and passes(giver, next(iter(value.users))):
            (value,) = value.users
        readers = list(value.users)
        if readers and all(_reads(reader, value) for reader in readers):
            found.append(Place(giver, value, readers))
    return found


def _reads(node: fx.Node, value: fx.Node) -> bool:
    linear = node.target is _aten.linear.default and owns_its_weight(node)
    return linear and node.args[0] is value


def _can_be_divided(node: fx.Node) -> bool:
    if node.target in _NORMS:
        constants = [constant for constant in _constants(node) if constant is not None]
        return bool(constants) and all(map(_is_own, constants))
    if node.target is _aten.mul.Tensor:  # the scale of an RMSNorm, written out
        return any(_is_own(used) and used.meta["val"].ndim == 1 for used in node.all_input_nodes)
    return node.target is _aten.linear.default and owns_its_weight(node)


def _constants(node: fx.Node) -> list[object]:
    """The operands among which scale and shift are."""
    return list(node.args[_NORMS.get(node.target, slice(None))])


def _is_own(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and len(value.users) == 1


def divide(graph_module: fx.GraphModule, units: dict[str, Tensor], giver: fx.Node, factor: Tensor) -> None:
    """Makes a node give its values divided by ``factor``."""
    if giver.target is _aten.linear.default:
        scale_rows(graph_module, units, giver, 1 / factor)
        return
    for constant in _constants(giver):
        if isinstance(constant, fx.Node) and _is_own(constant):
            path = str(constant.target)
            set_parameter(graph_module, path, get_tensor(graph_module, path).detach() / factor)
