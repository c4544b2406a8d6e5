"""Decides where a graph is quantized.

The rule (measured to be fast in ONNX Runtime and OpenVINO, see docs/design.md): the operands of every
convolution, linear layer, product, average pooling and residual sum are quantized where they are produced; nothing is
quantized between an operator and the activation function that fuses into it; operators that only move values
share one scale between input and output, a concatenation shares one between all its inputs; tables of embeddings are
stored in integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from tersor.core.quantization import QuantScheme
from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import get_tensor
from tersor.graph.rules import ACTIVATIONS, COMPUTE, LOOKUPS, PRODUCTS, SHARED, SOFTMAX, TRANSPARENT
from tersor.quantize.styles import Style
from tersor.quantize.widths import FLOAT, Widths, weight_scheme

ACTIVATIONS_PREFIX = "activation_quantizers"
WEIGHTS_PREFIX = "weight_quantizers"
KERNEL_BITS = 8  # operands that no layer narrows
_CHAIN = frozenset(COMPUTE) - LOOKUPS
_PASSED = ACTIVATIONS | TRANSPARENT | SHARED


@dataclass(frozen=True)
class Placement:
    """Where quantizers were put.

    Attributes:
        activations: Quantizer path -> name of the value that it rounds.
        weights: Quantizer path -> parameter path.
        compute: Names of the nodes that compute in low precision.
        kept: Names of the layers that the widths leave in float.
    """

    activations: dict[str, str]
    weights: dict[str, str]
    compute: tuple[str, ...]
    kept: tuple[str, ...] = ()


def place(graph_module: fx.GraphModule, widths: Widths, style: Style) -> Placement:
    """Inserts disabled `FakeQuantize` modules in place, one per group of values that share a scale.

    Raises:
        ConfigError: if a pattern of the widths fits no layer.
    """
    able = [node for node in graph_module.graph.nodes if _computes(graph_module, node, style)]
    layers = [node for node in able if COMPUTE[node.target].weight is not None]
    inner = [node for node in layers if node.target not in LOOKUPS]
    edges = {inner[0], inner[-1]} if inner else set()
    widths.check_used(_module(node) for node in layers)
    bits = {node: widths.weight(_module(node), edge=node in edges) for node in layers}
    exact = {_weight(node) for node in layers if bits[node] == FLOAT}
    bits |= {node: FLOAT for node in layers if _weight(node) in exact}  # a weight that is shared is one for all
    bits |= {node: KERNEL_BITS for node in layers if node.target in LOOKUPS and bits[node] != FLOAT}
    compute = [node for node in able if bits.get(node) != FLOAT]
    groups = _Groups()
    for node in compute:
        for operand in _operands(node):
            groups.add(operand)
    activations = {}
    for leader, members in groups.classes():
        path = f"{ACTIVATIONS_PREFIX}.{leader.name}"
        consumers = {user for member in members for user in member.users}
        needed = [widths.activation(_module(node), edge=node in edges) for node in inner if node in consumers]
        signed = (
            style.signed_products
            and any(user.target in PRODUCTS for user in consumers if user in compute)
            and not any(member.target in SOFTMAX for member in members)
        )
        scheme = QuantScheme(bits=max(needed, default=KERNEL_BITS), signed=signed, symmetric=signed)
        graph_module.add_submodule(path, FakeQuantize(scheme))
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
            readers = [user for user in weight.users if user in bits]
            kernels = [user for user in readers if user.target not in LOOKUPS]  # they decide, as for a tied head
            reduced = style.reduced_weights and bool(kernels)
            width = max(bits[user] for user in kernels or readers)
            scheme = weight_scheme(width, rule.channel_axis, reduced=reduced)
            graph_module.add_submodule(path, FakeQuantize(scheme))
            weights[path] = str(weight.target)
            _insert_late(graph_module, weight, path)
    graph_module.recompile()
    kept = tuple(node.name for node in layers if bits[node] == FLOAT)
    return Placement(activations, weights, tuple(node.name for node in compute), kept)


def _weight(layer: fx.Node) -> object:
    return layer.args[COMPUTE[layer.target].weight or 0]


def _module(node: fx.Node) -> str:
    return str(node.meta.get("module", ""))


def _computes(graph_module: fx.GraphModule, node: fx.Node, style: Style) -> bool:
    """Whether `node` can compute in low precision."""
    rule = COMPUTE.get(node.target)
    if rule is None or node.target in style.without_kernel:
        return False
    operands = _operands(node)
    if len(operands) != len(rule.activations) or not all(_is_float_value(operand) for operand in operands):
        return False
    if rule.weight is not None:
        weight = node.args[rule.weight]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not _is_parameter(graph_module, weight):
            return False
        axes = {COMPUTE[user.target].channel_axis for user in weight.users if user.target in COMPUTE}
        return len(axes) == 1  # a convolution and a transposed one that share a weight cannot share its scales
    # Sums and averages are worth it only inside a chain of low-precision operators.
    return all(map(_varies, operands)) if node.target in PRODUCTS else _inside_chain(node)


def _varies(value: fx.Node) -> bool:
    """Whether a value depends on the inputs."""
    frontier, seen = [value], set()
    while frontier:
        found = frontier.pop()
        if found.op == "placeholder":
            return True
        if found not in seen:
            seen.add(found)
            frontier.extend(found.all_input_nodes)
    return False


def _inside_chain(node: fx.Node) -> bool:
    if len(COMPUTE[node.target].activations) == 1:
        return _comes_from_compute(node)
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user.target in _CHAIN:
            return _comes_from_compute(node)
        if user.target in _PASSED:
            frontier.extend(user.users)
    return False


def _comes_from_compute(node: fx.Node) -> bool:
    frontier = _operands(node)
    while frontier:
        value = frontier.pop()
        if value.target in _CHAIN:
            return True
        if value.target in _PASSED:
            frontier.extend(value.all_input_nodes)
    return False


def _operands(node: fx.Node) -> list[fx.Node]:
    operands = [node.args[position] for position in COMPUTE[node.target].activations if position < len(node.args)]
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _is_float_value(value: fx.Node) -> bool:
    example = value.meta.get("val")
    return value.op != "get_attr" and isinstance(example, Tensor) and example.is_floating_point()


def _is_parameter(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return get_tensor(graph_module, str(node.target)).is_floating_point()


def _insert_after(graph_module: fx.GraphModule, node: fx.Node, path: str) -> None:
    with graph_module.graph.inserting_after(node):
        _insert(graph_module, node, path)


def _insert_late(graph_module: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Right before whoever reads `node` first: a run then holds one rounded weight at a time, not all of them."""
    first = node.next
    while first not in node.users:
        first = first.next
    with graph_module.graph.inserting_before(first):
        _insert(graph_module, node, path)


def _insert(graph_module: fx.GraphModule, node: fx.Node, path: str) -> None:
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
