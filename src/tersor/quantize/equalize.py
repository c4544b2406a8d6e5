"""Cross-layer equalization: gives the channels between two layers the same range on both sides.

``W₁ / s`` and ``W₂ · s`` with ``s = √(r₁ r₂) / r₂`` per channel, `r` the largest magnitude of its weights; the function
stays the same as far as what lies between is positively homogeneous, ``f(x / s) = f(x) / s``. It is what coarse scales,
one per tensor, need; scales per channel need it only for the second layer. Nagel et al. 2019, section 4.1,
https://arxiv.org/abs/1906.04721.

Shapes: `C` channels between the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.rules import COMPUTE, TRANSPOSED
from tersor.quantize.prepare import along

_aten = torch.ops.aten
# Functions that a positive factor per channel passes through.
_POINTWISE = frozenset(
    {
        _aten.relu.default,
        _aten.relu_.default,
        _aten.leaky_relu.default,
        _aten.leaky_relu_.default,
        _aten.dropout.default,
    }
)
# Over how many dimensions they pool: behind other layers they would mix the channels.
_POOLED: dict[object, int] = {
    _aten.max_pool1d.default: 1,
    _aten.avg_pool1d.default: 1,
    _aten.max_pool2d.default: 2,
    _aten.avg_pool2d.default: 2,
    _aten.adaptive_avg_pool2d.default: 2,
}
ROUNDS = 20
CONVERGED = 1e-3
LIMIT = 1e4  # of a factor: dead channels would have none


def equalize(graph_module: fx.GraphModule, units: dict[str, Tensor]) -> int:
    """Equalizes every pair of layers with nothing but homogeneous functions between them, in place.

    Args:
        graph_module: BatchNorm is folded, nothing is rounded yet.
        units: What the stored weights were multiplied by, by path (see `Prepared.units`); kept up to date.

    Returns:
        The number of pairs.
    """
    pairs = _pairs(graph_module)
    for _ in range(ROUNDS):
        furthest = 0.0
        for first, second in pairs:
            factor = _factor(graph_module, first, second)
            furthest = max(furthest, float(factor.log().abs().max()))
            scale_rows(graph_module, units, first, 1 / factor)
            scale_columns(graph_module, units, second, factor)
        if furthest < CONVERGED:
            break
    return len(pairs)


def _pairs(graph_module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    found = []
    for first in graph_module.graph.nodes:
        if not owns_its_weight(first):
            continue
        second = first
        while len(second.users) == 1:
            (second,) = second.users
            if not passes(first, second):
                break
        if second is first or not owns_its_weight(second) or _dimensions(second) != _dimensions(first):
            continue  # a linear layer's channels are the last dimension, a convolution's the second
        if _channels(second, columns=True) == _channels(first):
            found.append((first, second))
    return found


def passes(layer: fx.Node, function: fx.Node) -> bool:
    """Whether a positive factor per channel of a layer passes through a function behind it."""
    return function.target in _POINTWISE or _POOLED.get(function.target) == _dimensions(layer)


def _dimensions(node: fx.Node) -> int:
    """Of a convolution; of a linear layer 0."""
    return int(node.args[1].meta["val"].ndim) - 2  # type: ignore[union-attr]


def owns_its_weight(node: fx.Node) -> bool:
    """Whether this is a convolution or linear layer whose weight and bias nobody else reads."""
    rule = COMPUTE.get(node.target)
    if rule is None or rule.weight is None or not rule.activations or node.target in TRANSPOSED:
        return False
    constants = [node.args[place] for place in (rule.weight, rule.bias) if place is not None and place < len(node.args)]
    constants = [constant for constant in constants if constant is not None]
    return all(isinstance(value, fx.Node) and value.op == "get_attr" and len(value.users) == 1 for value in constants)


def _groups(node: fx.Node) -> int:
    """Groups of a convolution; of a linear layer one."""
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def _channels(node: fx.Node, *, columns: bool = False) -> int:
    """How many channels a layer gives, or takes."""
    shape: torch.Size = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return int(shape[1]) * _groups(node) if columns else int(shape[0])


def weight_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor]:
    """Path and value of a layer's weight."""
    path = str(node.args[1].target)  # type: ignore[union-attr]
    return path, get_tensor(graph_module, path).detach()


def _factor(graph_module: fx.GraphModule, first: fx.Node, second: fx.Node) -> Tensor:
    rows = weight_of(graph_module, first)[1].flatten(1).abs().amax(1)
    columns = column_peaks(graph_module, second)
    factor = (rows / columns).sqrt()
    usable = torch.isfinite(factor) & (factor < LIMIT) & (factor > 1 / LIMIT)
    return torch.where(usable, factor, 1.0)


def column_peaks(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """Largest magnitude of the weights that each input channel meets, `[C]`."""
    weight, groups = weight_of(graph_module, node)[1], _groups(node)
    return (
        weight.reshape(groups, -1, weight.shape[1], *weight.shape[2:]).abs().movedim(2, 1).flatten(2).amax(2).flatten()
    )


def scale_columns(graph_module: fx.GraphModule, units: dict[str, Tensor], node: fx.Node, factor: Tensor) -> None:
    """Multiplies what meets each input channel by ``factor``, `[C]`."""
    path, weight = weight_of(graph_module, node)
    groups = _groups(node)
    spread = factor.reshape(groups, 1, -1).expand(groups, len(weight) // groups, -1).reshape(len(weight), -1)
    _multiply(graph_module, units, path, spread.reshape(*spread.shape, *[1] * (weight.ndim - 2)))


def scale_rows(graph_module: fx.GraphModule, units: dict[str, Tensor], node: fx.Node, factor: Tensor) -> None:
    """Multiplies what a layer gives by ``factor``, `[C]`, bias included."""
    path, weight = weight_of(graph_module, node)
    _multiply(graph_module, units, path, along(factor, 0, weight.ndim))
    place = COMPUTE[node.target].bias
    bias = node.args[place] if place is not None and place < len(node.args) else None
    if isinstance(bias, fx.Node):
        value = get_tensor(graph_module, str(bias.target)).detach()
        set_parameter(graph_module, str(bias.target), value * factor)


def _multiply(graph_module: fx.GraphModule, units: dict[str, Tensor], path: str, factor: Tensor) -> None:
    set_parameter(graph_module, path, get_tensor(graph_module, path).detach() * factor)
    units[path] = units.get(path, torch.ones(())) * factor
