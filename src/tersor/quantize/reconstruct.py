"""Learns the rounding of weights, and the steps of activations, so that layers or blocks answer as in float.

A part of the graph, a layer or a block between two cuts, is trained on a few hundred examples:
``min E‖f̂(x̂) − f(x)‖² + λ Σ 1 − |2 h(V) − 1|^β``, where `x̂` comes from the rounded parts before it.
Single layers: AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568). Blocks: BRECQ (Li et al. 2021,
https://arxiv.org/abs/2102.05426). With `drop`, each rounded activation is left as it was with this probability: QDrop
(Wei et al. 2022, https://arxiv.org/abs/2203.05740).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.optim import Adam

from tersor.graph import FakeQuantize
from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.rules import ACTIVATIONS
from tersor.graph.stream import Environment, Stream, copied, mutates, run, segments, varying
from tersor.quantize.layers import Layer, layers
from tersor.quantize.prepare import Batches, Prepared, along
from tersor.quantize.reference import float_reference
from tersor.quantize.rounding import SoftRounding
from tersor.quantize.rounding.adaround import LEARNING_RATE, beta_at

Unit = Literal["layer", "block"]
STRENGTH = 1.0  # of the regularisation, against errors in units of what rounding to nearest errs by
STEP_RATE = 0.02  # learning rate of activation steps, as a share of the step


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        unit: What is trained at a time.
        steps: Of Adam, for each unit; each looks at one batch.
        drop: Probability with which a rounded activation is left as it was.
        seed: Fixes the order of batches and what is dropped.
    """

    unit: Unit = "block"
    steps: int = 1000
    drop: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class _Part:
    """Nodes that are trained together, and the layers among them."""

    nodes: list[fx.Node]
    layers: list[Layer]

    @property
    def inputs(self) -> list[fx.Node]:
        """What it needs from before."""
        inside = set(self.nodes)
        return list(dict.fromkeys(used for node in self.nodes for used in node.all_input_nodes if used not in inside))


def reconstruct(
    prepared: Prepared, batches: Batches, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> None:
    """Replaces weights by points of their grids, and steps of activations inside blocks, in place.

    A part for which rounding to nearest errs less keeps that: on these examples no part gets worse.

    Args:
        prepared: All ranges must be set.
        batches: Examples; a batch is what one step looks at.
        settings: How to train.
        progress: `(parts done, parts in all)`.
    """
    inputs = [tuple(batch.tensors().values()) for batch in batches()]
    reference, nodes = float_reference(prepared)
    wanted, given = Stream(reference, inputs), Stream(prepared.simulation, inputs)
    generator = torch.Generator().manual_seed(settings.seed)
    parts = _parts(prepared, settings.unit)
    for done, part in enumerate(parts):
        with torch.no_grad():
            data = _Data.of(part, nodes, wanted, given)
        _train(prepared, part, data, settings, generator)
        with torch.no_grad():
            given.advance(part.nodes[-1])
        if progress is not None:
            progress(done + 1, len(parts))


def _parts(prepared: Prepared, unit: Unit) -> list[_Part]:
    found = layers(prepared)
    if unit == "layer":
        order = varying(prepared.simulation)
        behind = dict(pairwise(order))
        return [_Part([layer.node, *_fused(layer.node, behind.get(layer.node))], [layer]) for layer in found]
    compute = set(prepared.placement.compute)
    marked = {
        node
        for node in prepared.simulation.graph.nodes
        if node.name in compute or (node.op == "call_module" and str(node.target) in prepared.placement.activations)
    }
    parts, waiting = [], []
    for segment in segments(prepared.simulation, marked):
        waiting += segment  # what holds no layer, the rounding of a block's input say, goes with the next one
        inside = set(waiting)
        own = [layer for layer in found if layer.node in inside]
        if own:
            parts.append(_Part(waiting, own))
            waiting = []
    return parts


def _fused(node: fx.Node, behind: fx.Node | None) -> list[fx.Node]:
    """The activation function right behind a layer; another layer between them must be learned before it runs."""
    alone = behind is not None and list(node.users) == [behind]
    return [behind] if behind is not None and alone and behind.target in ACTIVATIONS else []


@dataclass(frozen=True)
class _Data:
    """For each batch what goes into a part, rounded and in float, and what shall come out."""

    rounded: list[Environment]
    exact: list[Environment]
    targets: list[Tensor]

    @classmethod
    def of(cls, part: _Part, nodes: dict[str, fx.Node], wanted: Stream, given: Stream) -> _Data:
        variable = [node for node in part.inputs if _is_value(node, given)]
        rounded = [given.advance(node) for node in variable]
        exact = [wanted.advance(nodes[node.name]) for node in variable]
        pairs = [
            [dict(zip(variable, values, strict=True)) for values in zip(*columns, strict=True)]
            for columns in (rounded, exact)
        ]
        if any(map(mutates, part.nodes)):
            pairs[1] = [copied(values) for values in pairs[1]]  # else going on would change them
        return cls(pairs[0], pairs[1], wanted.advance(nodes[part.nodes[-1].name]))


def _is_value(node: fx.Node, stream: Stream) -> bool:
    return node.op == "placeholder" or node in stream.varying


class _Dropping(nn.Module):
    """Rounds with a learnable step (Esser et al. 2020, https://arxiv.org/abs/1902.08153), but not everywhere."""

    def __init__(self, quantizer: FakeQuantize, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.drop, self.generator = quantizer, drop, generator
        self.log_scale = nn.Parameter(quantizer.scale.log())  # a step of Adam is then a share of the scale

    def forward(self, values: Tensor) -> Tensor:
        scheme, scale = self.quantizer.scheme, self.log_scale.exp()
        codes = (values / scale + self.quantizer.zero_point).clamp(scheme.qmin, scheme.qmax)
        codes = codes + (codes.round() - codes).detach()  # straight through
        return mixed((codes - self.quantizer.zero_point) * scale, values, self.drop, self.generator)


class _Soft(nn.Module):
    """In the place of a weight's quantizer: the soft value; what pruning made zero stays zero."""

    def __init__(self, rounding: SoftRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: Tensor) -> Tensor:
        value: Tensor = self.rounding()
        return value.masked_fill(weight == 0, 0)


def mixed(rounded: Tensor, exact: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each entry the exact one with probability `drop`, else the rounded one."""
    if drop == 0 or not isinstance(rounded, Tensor) or not rounded.is_floating_point():  # sizes, masks
        return rounded
    return torch.where(torch.rand(rounded.shape, generator=generator) < drop, exact, rounded)


def _train(prepared: Prepared, part: _Part, data: _Data, settings: Settings, generator: torch.Generator) -> None:
    graph_module = prepared.simulation
    error = _error(graph_module, part, data)
    if error == 0 or not settings.steps:
        return
    before = {layer.weight: get_tensor(graph_module, layer.weight).detach() for layer in part.layers}
    with _learning(prepared, part, settings.drop, generator) as (soft, steps):
        optimizer = Adam(
            [
                {"params": [rounding.V for rounding in soft.values()], "lr": LEARNING_RATE},
                {"params": [step.log_scale for step in steps.values()], "lr": STEP_RATE / 10},
            ]
        )
        weights = sum(rounding.V.numel() for rounding in soft.values())
        for step in range(settings.steps):
            index = int(torch.randint(len(data.targets), (), generator=generator))
            rounded, exact = data.rounded[index], data.exact[index]
            inputs = {node: mixed(rounded[node], exact[node], settings.drop, generator) for node in rounded}
            with torch.enable_grad():
                loss = (run(graph_module, part.nodes, inputs) - data.targets[index]).square().mean() / error
                beta = beta_at(step, settings.steps)
                if beta is not None:
                    loss = loss + STRENGTH / weights * sum(r.regularisation(beta) for r in soft.values())
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    scales = {path: prepared.quantizer(path).scale for path in steps}
    for layer in part.layers:
        pruned = before[layer.weight] == 0
        set_parameter(graph_module, layer.weight, soft[layer.quantizer].hard().masked_fill(pruned, 0))
    for path, learned in steps.items():
        prepared.quantizer(path).scale = learned.log_scale.detach().exp()
    if not _error(graph_module, part, data) < error:
        for layer in part.layers:
            set_parameter(graph_module, layer.weight, before[layer.weight])
        for path, scale in scales.items():
            prepared.quantizer(path).scale = scale


@contextmanager
def _learning(
    prepared: Prepared, part: _Part, drop: float, generator: torch.Generator
) -> Iterator[tuple[dict[str, SoftRounding], dict[str, _Dropping]]]:
    """Puts learnable modules in the place of the part's quantizers, for a while; gives them by path."""
    graph_module, soft, steps = prepared.simulation, {}, {}
    originals: dict[str, FakeQuantize] = {}
    for layer in part.layers:
        quantizer = originals[layer.quantizer] = prepared.quantizer(layer.quantizer)
        weight = get_tensor(graph_module, layer.weight).detach()
        axis = layer.rule.channel_axis
        scale, zero = (along(values, axis, weight.ndim) for values in (quantizer.scale, quantizer.zero_point))
        soft[layer.quantizer] = SoftRounding(weight, quantizer.scheme, scale=scale, zero_point=zero)
        graph_module.set_submodule(layer.quantizer, _Soft(soft[layer.quantizer]))
    inside = set(part.nodes)
    calls = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module" and node not in inside}
    for node in part.nodes:
        path = str(node.target)
        own = path not in calls  # a scale that other parts share stays as it is
        if node.op == "call_module" and path in prepared.placement.activations and own and path not in steps:
            quantizer = prepared.quantizer(path)
            if quantizer.enabled:
                originals[path] = quantizer
                steps[path] = _Dropping(quantizer, drop, generator)
                graph_module.set_submodule(path, steps[path])
    try:
        yield soft, steps
    finally:
        for path, original in originals.items():
            graph_module.set_submodule(path, original)


def _error(graph_module: fx.GraphModule, part: _Part, data: _Data) -> float:
    """Mean squared error of the part's output as it is deployed."""
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, target in zip(data.rounded, data.targets, strict=True):
            total += float((run(graph_module, part.nodes, inputs) - target).square().sum(dtype=torch.float64))
            count += target.numel()
    return total / count
