"""Decides where a graph is quantized.

The rule (measured to be fast in ONNX Runtime and OpenVINO, see docs/design.md): the operands of every
convolution, linear layer, average pooling and residual sum are quantized where they are produced; nothing is
quantized between an operator and the activation function that fuses into it; operators that only move values
share one scale between input and output, a concatenation shares one between all its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from tersor.core.quantization import QuantScheme
from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import get_tensor
from tersor.graph.rules import ACTIVATIONS, COMPUTE, SHARED, TRANSPARENT

ACTIVATION_SCHEME = QuantScheme(bits=8)
ACTIVATIONS_PREFIX = "activation_quantizers"
WEIGHTS_PREFIX = "weight_quantizers"


@dataclass(frozen=True)
class Placement:
    """Where quantizers were put.

    Attributes:
        activations: Quantizer path -> name of the value that it rounds.
        weights: Quantizer path -> parameter path.
        compute: Names of the nodes that compute in low precision.
    """

    activations: dict[str, str]
    weights: dict[str, str]
    compute: tuple[str, ...]


def place(graph_module: fx.GraphModule, weight_scheme: QuantScheme) -> Placement:
    """Inserts disabled `FakeQuantize` modules in place, one per group of values that share a scale."""
    compute = [node for node in graph_module.graph.nodes if _computes(graph_module, node)]
    groups = _Groups()
    for node in compute:
        for operand in _operands(node):
            groups.add(operand)
    activations = {}
    for leader, members in groups.classes():
        path = f"{ACTIVATIONS_PREFIX}.{leader.name}"
        graph_module.add_submodule(path, FakeQuantize(ACTIVATION_SCHEME))
        activations[path] = leader.name
        for member in members:
            _insert_after(graph_module, member, path)
    weights: dict[str, str] = {}
    for node in compute:
        rule = COMPUTE[node.target]
        weight = node.args[rule.weight] if rule.weight is not None else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":  # else an earlier layer shares it: done
            path = f"{WEIGHTS_PREFIX}.{str(weight.target).replace('.', '_')}"
            while path in weights:  # `a.b_c` and `a_b.c`
                path += "_"
            scheme = weight_scheme.model_copy(update={"axis": rule.channel_axis})
            graph_module.add_submodule(path, FakeQuantize(scheme))
            weights[path] = str(weight.target)
            _insert_after(graph_module, weight, path)
    graph_module.recompile()
    return Placement(activations, weights, tuple(node.name for node in compute))


def _computes(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is to compute in low precision."""
    rule = COMPUTE.get(node.target)
    if rule is None:
        return False
    operands = _operands(node)
    if len(operands) != len(rule.activations) or not all(_is_float_value(operand) for operand in operands):
        return False
    if rule.weight is not None:
        weight = node.args[rule.weight]
        return isinstance(weight, fx.Node) and weight.op == "get_attr" and _is_parameter(graph_module, weight)
    # Sums and averages are worth it only inside a chain of low-precision operators.
    return _inside_chain(node)


def _inside_chain(node: fx.Node) -> bool:
    if len(COMPUTE[node.target].activations) == 1:
        return _comes_from_compute(node)
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user.target in COMPUTE:
            return _comes_from_compute(node)
        if user.target in ACTIVATIONS | TRANSPARENT | SHARED:
            frontier.extend(user.users)
    return False


def _comes_from_compute(node: fx.Node) -> bool:
    frontier = _operands(node)
    while frontier:
        value = frontier.pop()
        if value.target in COMPUTE:
            return True
        if value.target in ACTIVATIONS | TRANSPARENT | SHARED:
            frontier.extend(value.all_input_nodes)
    return False


def _operands(node: fx.Node) -> list[fx.Node]:
    operands = [node.args[position] for position in COMPUTE[node.target].activations]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _is_float_value(value: fx.Node) -> bool:
    example = value.meta.get("val")
    return value.op != "get_attr" and isinstance(example, Tensor) and example.is_floating_point()


def _is_parameter(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return get_tensor(graph_module, str(node.target)).is_floating_point()


def _insert_after(graph_module: fx.GraphModule, node: fx.Node, path: str) -> None:
    with graph_module.graph.inserting_after(node):
        quantizer = graph_module.graph.call_module(path, (node,))
    quantizer.meta = dict(node.meta)
    node.replace_all_uses_with(quantizer, delete_user_cb=lambda user: user is not quantizer)


class _Groups:
    """Values that share one scale: union-find over graph nodes."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def add(self, value: fx.Node) -> fx.Node:
        """Takes in a value that must be quantized, and whatever has to share its scale."""
        if value in self.parent:
            return self.find(value)
        self.parent[value] = value
        if value.target in TRANSPARENT:
            sources = value.all_input_nodes[:1]
        elif value.target in SHARED:
            sources = value.all_input_nodes
        else:
            sources = []
        for source in sources:
            if source.op != "get_attr":  # a parameter is no activation: only what is made of it is rounded
                self.join(value, self.add(source))
        return self.find(value)

    def find(self, value: fx.Node) -> fx.Node:
        while self.parent[value] is not value:
            value = self.parent[value]
        return value

    def join(self, value: fx.Node, other: fx.Node) -> None:
        self.parent[self.find(value)] = self.find(other)

    def classes(self) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Each group's leader with its members, in the order of the graph."""
        classes: dict[fx.Node, list[fx.Node]] = {}
        for value in self.parent:
            classes.setdefault(self.find(value), []).append(value)
        return list(classes.items())
