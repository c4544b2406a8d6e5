"""Folds BatchNorm into the convolution or linear layer before it (Jacob et al. 2018, section 3.2).

``W' = W · γ/σ`` per output channel and ``b' = β + (b − μ) · γ/σ`` with ``σ = sqrt(var + eps)``.
See https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.graph.rules import COMPUTE

_BATCH_NORM = torch.ops.aten.batch_norm.default
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm that is gone; `[K]` each, `K` output channels.

    Attributes:
        factor: What each output channel of the weight was multiplied by: ``γ/σ``.
        gamma: Its scale, None without.
        beta: Its shift, None without.
        mean: Running mean.
        variance: Running variance.
        epsilon: Added to the variance.
        module: Path of the module.
        axis: Dimension of the weight that is the output channel.
    """

    factor: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    epsilon: float
    module: str
    axis: int


def fold_batch_norm(graph_module: fx.GraphModule) -> dict[str, FoldedNorm]:
    """Folds in place wherever it is exact: evaluation mode, one user, a weight that nobody shares.

    Returns:
        What was folded, by the path of the weight that it went into.
    """
    folded: dict[str, FoldedNorm] = {}
    for norm in list(graph_module.graph.nodes):
        if norm.target is not _BATCH_NORM or norm.args[5]:
            continue
        layer = norm.args[0]
        rule = COMPUTE.get(layer.target)
        if rule is None or rule.weight is None or rule.bias is None or len(layer.users) > 1:
            continue
        weight_node = layer.args[rule.weight]
        bias_node = layer.args[rule.bias] if len(layer.args) > rule.bias else None
        parameters = [weight_node, *([bias_node] if bias_node is not None else [])]
        if any(node.op != "get_attr" or len(node.users) > 1 for node in parameters):
            continue
        if layer.target is _LINEAR and layer.meta["val"].ndim != 2:
            continue  # BatchNorm counts channels along the second dimension, a linear layer along the last
        grouped = rule.channel_axis != 0 and len(layer.args) > 6 and layer.args[6] != 1  # transposed: `[I, O / G, …]`
        if grouped:
            continue
        folded[str(weight_node.target)] = _fold(graph_module, norm, layer, weight_node, bias_node)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    remove_unused_attributes(graph_module)
    graph_module.recompile()
    return folded


def _fold(
    graph_module: fx.GraphModule,
    norm: fx.Node,
    layer: fx.Node,
    weight_node: fx.Node,
    bias_node: fx.Node | None,
) -> FoldedNorm:
    rule = COMPUTE[layer.target]
    gamma, beta, mean, variance = (_constant(graph_module, node) for node in norm.args[1:5])
    assert mean is not None  # noqa: S101 - evaluation mode has running statistics
    assert variance is not None  # noqa: S101 - as above
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)  # noqa: S101 - the operator's schema
    sigma = torch.sqrt(variance.double() + epsilon)
    factor = (torch.ones_like(sigma) if gamma is None else gamma.double()) / sigma
    weight = get_tensor(graph_module, str(weight_node.target))
    shape = [-1 if axis == rule.channel_axis else 1 for axis in range(weight.ndim)]
    old_bias = 0.0 if bias_node is None else get_tensor(graph_module, str(bias_node.target)).detach().double()
    bias = (0.0 if beta is None else beta.double()) + (old_bias - mean.double()) * factor
    set_parameter(graph_module, str(weight_node.target), weight.detach().double() * factor.reshape(shape))
    bias_path = _free_path(graph_module, str(weight_node.target)) if bias_node is None else str(bias_node.target)
    set_parameter(graph_module, bias_path, bias)
    with graph_module.graph.inserting_before(layer):
        new_bias = graph_module.graph.get_attr(bias_path)
    arguments = [*layer.args]
    assert rule.bias is not None  # noqa: S101 - checked by the caller
    arguments[rule.bias : rule.bias + 1] = [new_bias]
    layer.args = tuple(arguments)
    norm.replace_all_uses_with(layer)
    graph_module.graph.erase_node(norm)
    module = str(norm.meta.get("module", ""))
    return FoldedNorm(factor.float(), gamma, beta, mean, variance, epsilon, module, rule.channel_axis)


def _free_path(root: nn.Module, weight_path: str) -> str:
    """Where the bias that a layer gets shall stand: beside its weight, under a name that nothing else has."""
    parent, _, name = weight_path.rpartition(".")
    taken = getattr(root.get_submodule(parent), "bias", None) is not None
    return ".".join(part for part in (parent, f"{name}_bias" if taken else "bias") if part)


def _constant(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    return get_tensor(graph_module, str(node.target)).detach() if isinstance(node, fx.Node) else None


def get_tensor(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at `path`."""
    parent, _, name = path.rpartition(".")
    value = getattr(root.get_submodule(parent), name)
    assert isinstance(value, Tensor)  # noqa: S101 - only called for tensors
    return value


def set_parameter(root: nn.Module, path: str, value: Tensor) -> None:
    """Puts a new parameter at `path`; tensors that shared the old one's memory stay as they are."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, nn.Parameter(value.float(), requires_grad=False))


def remove_unused_attributes(graph_module: fx.GraphModule) -> None:
    """Deletes parameters and buffers that no node reads any more; they would be exported otherwise."""
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    names = [name for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if name not in used and parent not in called:
            delattr(graph_module.get_submodule(parent), leaf)
