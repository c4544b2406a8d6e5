"""Runs a graph node by node over several batches at once, and forgets what nobody needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, fx

Environment = dict[fx.Node, Any]


class Stream:
    """A run that stops at any node, so that what comes later can still be changed.

    Layers are worked on in the order in which they compute: each sees what the layers before it, already rounded, give
    it, at the cost of a single run in all. Only values that are still needed are kept; parameters, and what is made of
    them alone, are looked up afresh whenever a node needs them.

    Args:
        graph_module: Takes its inputs by position.
        batches: The inputs of each batch.

    Attributes:
        environments: Of each batch the values that are still needed.
        varying: The nodes that depend on the inputs, with their place in the order of the run.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        self.graph_module = graph_module
        self.environments: list[Environment] = [{} for _ in batches]
        self._nodes = varying(graph_module)
        self.varying = {node: place for place, node in enumerate(self._nodes)}
        self._last = {used: node for node in self._nodes for used in node.all_input_nodes}
        self._done = 0
        inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for environment, batch in zip(self.environments, batches, strict=True):
            environment.update(zip(inputs, batch, strict=True))
        if any(map(mutates, self._nodes)):  # the caller's tensors stay as they are
            self.environments = [copied(environment) for environment in self.environments]

    def advance(self, node: fx.Node) -> list[Tensor]:
        """Runs up to and including `node`; returns its value for each batch."""
        while node in self.varying and self._done <= self.varying[node]:
            current = self._nodes[self._done]
            for environment in self.environments:
                environment[current] = call(self.graph_module, current, environment)
                for used in current.all_input_nodes:
                    if self._last[used] is current:
                        environment.pop(used, None)
            self._done += 1
        return [environment[node] for environment in self.environments]

    def peek(self, node: fx.Node) -> list[Tensor]:
        """What `node` would give now, without going on; what it needs must be there."""
        return [run(self.graph_module, [node], environment) for environment in self.environments]


def call(graph_module: fx.GraphModule, node: fx.Node, environment: Environment) -> Any:
    """The value of one node; of nodes that are not in the environment, of parameters say, it is found on the way."""
    if node.op == "get_attr":
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def look_up(used: fx.Node) -> Any:
        return environment[used] if used in environment else call(graph_module, used, environment)

    args, kwargs = fx.map_arg(node.args, look_up), fx.map_arg(node.kwargs, look_up)
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    assert callable(node.target)  # noqa: S101 - captured graphs call functions and quantizers, nothing else
    return node.target(*args, **kwargs)


def run(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], environment: Environment) -> Any:
    """The value of the last of the nodes, which are run in turn; the environment stays as it is."""
    values = copied(environment) if any(map(mutates, nodes)) else dict(environment)
    for node in nodes:
        if mutates(node):  # writes into a copy: what layers saw before is needed for their gradients
            operand = node.all_input_nodes[0]
            if operand in values and not values[operand]._is_view():
                values[operand] = values[operand].clone()
        values[node] = call(graph_module, node, values)
    return values[nodes[-1]]


def mutates(node: fx.Node) -> bool:
    """Whether this is an operator like `relu_`, which writes into its operand."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def copied(environment: Environment) -> Environment:
    """The same values in memory of their own."""
    return {node: value.clone() if isinstance(value, Tensor) else value for node, value in environment.items()}


def varying(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that depend on the inputs, in order, without inputs and output."""
    depends: set[fx.Node] = set()
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            depends.add(node)
        elif node.op != "output" and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            found.append(node)
    return found


def segments(graph_module: fx.GraphModule, marked: AbstractSet[fx.Node]) -> list[list[fx.Node]]:
    """Cuts a graph where all that later nodes need of the marked ones is a single value.

    Args:
        graph_module: Not changed.
        marked: Nodes whose values, and whatever is made of them, count; others, a mask say, may cross a cut.

    Returns:
        Neighbouring nodes that depend on the inputs, each segment with at least one marked node.
    """
    nodes = varying(graph_module)
    last = {used: place for place, node in enumerate(nodes) for used in node.all_input_nodes}
    last |= {used: len(nodes) for used in graph_module.graph.output_node().all_input_nodes}
    counting: set[fx.Node] = set()
    found: list[list[fx.Node]] = [[]]
    for place, node in enumerate(nodes):
        found[-1].append(node)
        sized = not isinstance(node.meta.get("val"), Tensor)  # a size is no value that layers give
        if node in marked or not (sized or counting.isdisjoint(node.all_input_nodes)):
            counting.add(node)
        needed = [value for value in counting if last.get(value, -1) > place]
        if needed == [node] and not marked.isdisjoint(found[-1]):
            found.append([])
    return [segment for segment in found if not marked.isdisjoint(segment)]
