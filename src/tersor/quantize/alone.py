"""Runs of a prepared graph in which a single layer is rounded and all others compute in float.

Shapes: `B` batch, `C` channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.batch import Batch
from tersor.graph.rules import COMPUTE, LOOKUPS
from tersor.graph.stream import Environment, Stream, call, varying
from tersor.probe import multiply_accumulates
from tersor.quantize.prepare import Prepared, set_weight_ranges
from tersor.quantize.widths import weight_scheme

Visit = Callable[["Solo", int, Tensor, Tensor, Batch], None]  # layer, bits, answer, answer in float, batch


@dataclass(frozen=True)
class Solo:
    """What gets one width: a module, or several that share a weight.

    Attributes:
        name: Path of the module that computes first.
        modules: Paths of all.
        nodes: The operators, in the order of the graph.
        weights: Weight quantizer path -> parameter path; of a layer in float the parameter's for both.
        fixed: Whether the placement fixes its width, as that of embedding tables.
        edge: Whether it is the first or the last layer.
    """

    name: str
    modules: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    weights: dict[str, str]
    fixed: bool
    edge: bool


def solos(prepared: Prepared, *, kept: bool = False) -> list[Solo]:
    """The layers whose weights are rounded, in the order of the graph; with `kept` also those left in float."""
    users: list[tuple[fx.Node, str]] = []
    for node in prepared.simulation.graph.nodes:
        path = _weight_quantizer(prepared, node, kept=kept)
        if path is not None:
            users.append((node, path))
    inner = [node for node, _ in users if node.target not in LOOKUPS]
    edges = {inner[0], inner[-1]} if inner else set()
    groups: list[list[tuple[fx.Node, str]]] = []
    for node, path in users:
        joined = [group for group in groups if any(_belongs(node, path, *other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(member for group in joined for member in group), (node, path)])
    order = {node: place for place, (node, _) in enumerate(users)}
    found = []
    for group in sorted(groups, key=lambda group: order[group[0][0]]):
        nodes = tuple(sorted((node for node, _ in group), key=order.__getitem__))
        modules = tuple(dict.fromkeys(_module(node) for node in nodes))
        weights = {path: prepared.placement.weights.get(path, path) for _, path in group}
        fixed = any(node.target in LOOKUPS for node in nodes)
        found.append(Solo(modules[0], modules, nodes, weights, fixed, not edges.isdisjoint(nodes)))
    return found


def _belongs(node: fx.Node, path: str, other: fx.Node, other_path: str) -> bool:
    return path == other_path or _module(node) == _module(other)


def _module(node: fx.Node) -> str:
    return str(node.meta.get("module", ""))


def _weight_quantizer(prepared: Prepared, node: fx.Node, *, kept: bool) -> str | None:
    """Path of the quantizer of a layer's weight, or of the weight itself where it is kept and this is asked for."""
    rule = COMPUTE.get(node.target)
    weight = node.args[rule.weight] if rule is not None and rule.weight is not None else None
    if not isinstance(weight, fx.Node):
        return None
    found = str(weight.target) in prepared.placement.weights or (kept and node.name in prepared.placement.kept)
    return str(weight.target) if found else None


class Grids:
    """The grids of every weight at several widths; a weight is on at most one of them at a time.

    Args:
        prepared: Its weight quantizers are left disabled.
        found: The layers.
        bits: The widths.
    """

    def __init__(self, prepared: Prepared, found: Sequence[Solo], bits: Sequence[int]) -> None:
        self._quantizers = {path: prepared.quantizer(path) for solo in found for path in solo.weights}
        before = {path: quantizer.scheme for path, quantizer in self._quantizers.items()}
        fixed = {path for solo in found if solo.fixed for path in solo.weights}
        self._grids: dict[tuple[str, int], tuple[Any, Tensor, Tensor]] = {}
        for width in bits:
            for path, quantizer in self._quantizers.items():
                reduced = prepared.style.reduced_weights and path not in fixed
                quantizer.scheme = weight_scheme(width, before[path].axis, reduced=reduced)
            set_weight_ranges(prepared)
            for path, quantizer in self._quantizers.items():
                self._grids[path, width] = quantizer.scheme, quantizer.scale, quantizer.zero_point
        for path, quantizer in self._quantizers.items():
            quantizer.scheme, quantizer.enabled = before[path], False

    @contextmanager
    def rounding(self, solo: Solo, width: int) -> Iterator[None]:
        """Rounds the weights of one layer meanwhile."""
        for path in solo.weights:
            quantizer = self._quantizers[path]
            quantizer.scheme, quantizer.scale, quantizer.zero_point = self._grids[path, width]
            quantizer.enabled = True
        try:
            yield
        finally:
            for path in solo.weights:
                self._quantizers[path].enabled = False


def visit_each(
    prepared: Prepared,
    plan: Sequence[tuple[Solo, Sequence[int]]],
    grids: Grids,
    batch: Batch,
    visit: Visit,
    *,
    rounded: Collection[str] = (),
) -> None:
    """Answers of the model on one batch with each layer rounded alone, at each of its widths.

    What comes before a layer is run once for all its widths.

    Args:
        prepared: All quantizers disabled.
        plan: Layers in the order of the graph, with the widths to try.
        grids: Of these layers.
        batch: Inputs.
        visit: Gets the answers.
        rounded: Activation quantizers, with ranges, that round the input of the layer, and nothing else's.
    """
    graph_module = prepared.simulation
    inputs = tuple(batch.tensors().values())
    nodes = varying(graph_module)
    places = {node: place for place, node in enumerate(nodes)}
    last = {used: place for place, node in enumerate(nodes) for used in node.all_input_nodes}
    (output,) = graph_module.graph.output_node().all_input_nodes
    mutating = any(_mutates(node) for node in nodes)
    with torch.no_grad():
        expected = graph_module(*inputs)
        stream = Stream(graph_module, [inputs])
        for solo, widths in plan:
            start = min((places[node] for node in solo.nodes if node in places), default=None)
            if start is None:  # a table that is looked up with constants
                continue
            if start:
                stream.advance(nodes[start - 1])
            for width in widths:
                values = dict(stream.environments[0])
                if mutating:  # copied at once: some of them may share memory
                    values = dict(zip(values, copy.deepcopy([*values.values()]), strict=True))
                with grids.rounding(solo, width):
                    for place in range(start, len(nodes)):
                        node = nodes[place]
                        values[node] = _called(prepared, node, values, rounded if node in solo.nodes else ())
                        for used in node.all_input_nodes:
                            if last[used] == place and used is not output:
                                values.pop(used, None)
                visit(solo, width, values[output], expected, batch)


def _called(prepared: Prepared, node: fx.Node, values: Environment, rounded: Collection[str]) -> Any:
    """What a node gives if its operands are rounded by these quantizers."""
    changed = dict(values)
    for source in node.all_input_nodes:
        if source.op == "call_module" and str(source.target) in rounded:
            quantizer = prepared.quantizer(str(source.target))
            quantizer.enabled = True
            changed[source] = quantizer(values[source])
            quantizer.enabled = False
    return call(prepared.simulation, node, changed)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def pause(prepared: Prepared) -> None:
    """Disables all quantizers; their ranges stay."""
    for path in (*prepared.placement.activations, *prepared.placement.weights):
        prepared.quantizer(path).enabled = False


def lay_out_fast(prepared: Prepared, example: Batch) -> None:
    """Stores kernels with the channels last, which is up to twice as fast here, if the graph runs that way."""
    kernels = [parameter for parameter in prepared.simulation.parameters() if parameter.ndim == 4]
    for parameter in kernels:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            prepared.simulation(*example.tensors().values())
    except RuntimeError:  # it asks for a view of what is now laid out otherwise
        for parameter in kernels:
            parameter.data = parameter.data.contiguous()


class _Operator(nn.Module):
    """One node as a module, to be counted."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.target = node.target

    def forward(self, *args: Any) -> Any:
        assert callable(self.target)  # noqa: S101 - layers are calls of functions
        return self.target(*args)


def macs_of(prepared: Prepared, found: Sequence[Solo], example: Batch) -> dict[str, int]:
    """Multiply-accumulates of each layer in one call with `example`."""
    graph_module = prepared.simulation
    owner = {node: solo.name for solo in found for node in solo.nodes}
    counts = {solo.name: 0 for solo in found}
    stream = Stream(graph_module, [tuple(example.tensors().values())])
    (environment,) = stream.environments

    def look_up(used: fx.Node) -> Any:
        return environment[used] if used in environment else call(graph_module, used, environment)

    with torch.no_grad():
        for node in varying(graph_module):
            if node in owner:
                counts[owner[node]] += multiply_accumulates(_Operator(node), fx.map_arg(node.args, look_up), {})
            stream.advance(node)
    return counts
