"""Takes folded BatchNorm out of the weights again, so that it can be trained.

``y = BN(W · x + b)`` stands in the graph as it did in the module, between the layer and its activation function. Where
``γ < 0`` the channel is turned round: ``W, b, μ`` change their sign and ``γ`` becomes ``|γ|``, which gives the same
values. Folding then multiplies by ``γ/σ ≥ 0`` and never turns an integer code round, whose range is not symmetric.

Shapes: `K` output channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import UnsupportedError
from tersor.graph.fold import FoldedNorm, get_tensor, remove_unused_attributes, set_parameter
from tersor.graph.rules import COMPUTE

_NORMS: dict[int, type[_BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def unfold_batch_norm(
    graph_module: fx.GraphModule, folded: Mapping[str, FoldedNorm], module: nn.Module
) -> dict[str, _BatchNorm]:
    """Puts each raw weight back and a BatchNorm module behind its layer, in place; every path is the module's own.

    Args:
        graph_module: After `fold_batch_norm`, with or without quantizers on its weights.
        folded: What `fold_batch_norm` returned.
        module: What was captured; stays as it is.

    Returns:
        The BatchNorm modules by their paths, all of their scales at least zero.

    Raises:
        UnsupportedError: if a BatchNorm is no module of its own.
    """
    norms: dict[str, _BatchNorm] = {}
    for weight, norm in folded.items():
        source = _source(module, norm, weight)
        layer = _layer(graph_module, weight)
        sign = _sign(source.weight if source.affine else None, len(norm.factor))
        if norm.module not in norms:
            example = layer.meta["val"]
            norms[norm.module] = _trainable(_NORMS[example.ndim], source, norm, sign)
            _install(graph_module, norm.module, norms[norm.module])
        raw = get_tensor(module, weight).detach()
        set_parameter(graph_module, weight, raw * sign.reshape([-1 if d == norm.axis else 1 for d in range(raw.ndim)]))
        _restore_bias(graph_module, layer, module, sign)
        _insert_behind(graph_module, layer, norm.module)
    graph_module.graph.eliminate_dead_code()
    remove_unused_attributes(graph_module)
    graph_module.recompile()
    return norms


def keep_scales_positive(norms: Mapping[str, _BatchNorm]) -> None:
    """Stops scales at zero, in place: below, folding would turn integer codes round."""
    with torch.no_grad():
        for norm in norms.values():
            if norm.affine:
                norm.weight.clamp_(min=0)


def write_back(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """Copies the graph's parameters and buffers into the module, in place, by their paths."""
    theirs = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for path, value in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
            if path in theirs:
                theirs[path].copy_(value)


def _source(module: nn.Module, norm: FoldedNorm, weight: str) -> _BatchNorm:
    """The module that was folded."""
    try:
        found = module.get_submodule(norm.module)
    except AttributeError:
        found = None
    if not isinstance(found, _BatchNorm) or found.running_mean is None:
        raise UnsupportedError(
            f"the BatchNorm behind {weight!r} is called as a function in {norm.module!r}, so there is no module to "
            "train; make it an nn.BatchNorm of its own"
        )
    return found


def _layer(graph_module: fx.GraphModule, weight: str) -> fx.Node:
    """The layer that computes with this weight, which nobody shares."""
    node: fx.Node = next(node for node in graph_module.graph.nodes if node.op == "get_attr" and node.target == weight)
    while node.target not in COMPUTE:  # a quantizer stands between
        (node,) = node.users
    return node


def _sign(gamma: Tensor | None, channels: int) -> Tensor:
    return torch.ones(channels) if gamma is None else torch.where(gamma.detach() < 0, -1.0, 1.0)


def _trainable(kind: type[_BatchNorm], source: _BatchNorm, norm: FoldedNorm, sign: Tensor) -> _BatchNorm:
    made = kind(len(norm.factor), eps=norm.epsilon, momentum=source.momentum, affine=source.affine)
    assert source.running_mean is not None  # noqa: S101 - else it would not have been folded
    assert made.running_mean is not None  # noqa: S101 - made so
    with torch.no_grad():
        made.load_state_dict(source.state_dict(), strict=False)
        made.running_mean.copy_(source.running_mean * sign)
        if made.affine:
            made.weight.copy_(source.weight.abs())
    return made.eval()


def _install(graph_module: fx.GraphModule, path: str, norm: _BatchNorm) -> None:
    """Puts the BatchNorm at its path; what the graph holds below it stays, e.g. an activation function's parameter."""
    try:
        below = dict(graph_module.get_submodule(path).named_children())
    except AttributeError:
        below = {}
    for name, child in below.items():
        norm.add_module(name, child)
    graph_module.add_submodule(path, norm)


def _insert_behind(graph_module: fx.GraphModule, layer: fx.Node, path: str) -> None:
    with graph_module.graph.inserting_after(layer):
        behind = graph_module.graph.call_module(path, (layer,))
    behind.meta = dict(layer.meta)
    layer.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)


def _restore_bias(graph_module: fx.GraphModule, layer: fx.Node, module: nn.Module, sign: Tensor) -> None:
    """The layer's own bias, or none, in place of the one that folding made."""
    position = COMPUTE[layer.target].bias
    assert position is not None  # noqa: S101 - else nothing would have been folded
    bias = layer.args[position]
    assert isinstance(bias, fx.Node)  # noqa: S101 - folding put it there
    path = str(bias.target)
    if path in dict(module.named_parameters(remove_duplicate=False)):
        set_parameter(graph_module, path, get_tensor(module, path).detach() * sign)
        return
    layer.args = (*layer.args[:position], None, *layer.args[position + 1 :])
