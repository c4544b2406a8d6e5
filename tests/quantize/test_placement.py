from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.quantization import QuantScheme
from tersor.core.target import Target
from tersor.errors import ConfigError
from tersor.graph import FakeQuantize, fold_batch_norm
from tersor.graph.attention_parts import take_attention_apart
from tersor.quantize.placement import Placement, place
from tersor.quantize.styles import Style, style_for
from tersor.quantize.widths import Widths, weight_scheme
from zoo import MLP_DATA, TEXT_DATA, TEXT_DYNAMIC, Cnn, Depthwise, Mlp, Scaling, Transformer, captured, normal, seeded

IMAGE = normal(2, 3, 8, 8)
PLAIN = Style()
aten = torch.ops.aten


class Placed:
    """A graph with quantizers in it, and questions about them."""

    def __init__(self, graph_module: fx.GraphModule, style: Style = PLAIN, **widths: Any) -> None:
        fold_batch_norm(graph_module)
        take_attention_apart(graph_module)
        self.placement: Placement = place(graph_module, Widths(**widths), style)
        self.nodes = list(graph_module.graph.nodes)
        self.graph_module = graph_module

    def only(self, target: object, position: int = 0) -> fx.Node:
        return [node for node in self.nodes if node.target is target][position]

    def quantizer(self, node: object) -> str | None:
        """Path of the quantizer that rounds this value, None if it stays float."""
        assert isinstance(node, fx.Node)
        users = [user for user in node.users if user.op == "call_module"]
        assert len(users) <= 1, "a value must not be rounded twice"
        if users:
            assert len(node.users) == 1, "all readers must get the rounded value"
        return str(users[0].target) if users else None

    def scheme(self, node: object) -> QuantScheme:
        """How this value, or this weight, is rounded."""
        path = self.quantizer(node)
        assert path is not None
        found = self.graph_module.get_submodule(path)
        assert isinstance(found, FakeQuantize)
        return found.scheme

    def weight_scheme(self, name: str) -> QuantScheme:
        """How the weight of this name is rounded."""
        return self.scheme(next(node for node in self.nodes if node.op == "get_attr" and node.target == name))

    def inputs_rounded(self, node: fx.Node) -> list[bool]:
        """For each operand whether it comes from a quantizer."""
        return [argument.op == "call_module" for argument in node.all_input_nodes]


def placed(build: Callable[[], nn.Module], *inputs: Tensor, style: Style = PLAIN, **widths: Any) -> Placed:
    return Placed(captured(seeded(build), Batch(inputs, {}, None)), style, **widths)


class Net(nn.Module):
    """A convolution, something in between, a convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(channels, 2, 1)
        self.between = between

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.between(self.first(image)))


def test_a_residual_sum_is_rounded_before_and_after_but_not_inside() -> None:
    net = placed(Cnn, IMAGE)
    total = net.only(aten.add.Tensor)
    assert net.inputs_rounded(total) == [True, True]
    assert net.quantizer(net.only(aten.conv2d.default, 1)) is not None  # the branch that is not activated
    assert net.quantizer(total) is None  # the activation fuses into the sum
    (after,) = total.users
    assert after.target in (aten.relu.default, aten.relu_.default)
    assert net.quantizer(after) is not None
    assert total.name in net.placement.compute


def test_nothing_is_rounded_between_a_layer_and_its_activation() -> None:
    for activation in (functional.relu, functional.relu6, nn.Hardtanh(), lambda x: functional.relu(x, inplace=True)):
        net = placed(lambda activation=activation: Net(activation), IMAGE)
        first, last = (net.only(aten.conv2d.default, position) for position in (0, 1))
        assert net.quantizer(first) is None
        assert net.inputs_rounded(first)[0]
        assert net.inputs_rounded(last)[0]


def test_a_function_that_does_not_fuse_gets_float_and_is_rounded_after() -> None:
    net = placed(lambda: Net(functional.silu), IMAGE)
    assert net.quantizer(net.only(aten.conv2d.default)) is None
    assert net.quantizer(net.only(aten.silu.default)) is not None


@pytest.mark.parametrize(
    ("move", "operator"),
    [
        (lambda x: functional.max_pool2d(x, 2), aten.max_pool2d.default),
        (lambda x: functional.pad(x, (1, 1, 1, 1)), aten.pad.default),
        (lambda x: x[:, :, 2:], aten.slice.Tensor),
        (lambda x: x.transpose(2, 3), aten.transpose.int),
        (lambda x: x.permute(0, 1, 3, 2), aten.permute.default),
        (lambda x: x.reshape(x.shape[0], 4, 4, 16), aten.reshape.default),
        (lambda x: functional.dropout(x, 0.5, False), None),
    ],
    ids=["max_pool", "pad", "slice", "transpose", "permute", "reshape", "dropout"],
)
def test_what_only_moves_values_shares_their_scale(move: Callable[[Tensor], Tensor], operator: object) -> None:
    net = placed(lambda: Net(lambda x: move(functional.relu(x))), IMAGE)
    activated = net.only(aten.relu.default)
    path = net.quantizer(activated)
    assert path is not None
    if operator is not None:
        assert net.quantizer(net.only(operator)) == path
    assert net.inputs_rounded(net.only(aten.conv2d.default, 1))[0]
    assert len(net.placement.activations) == 2  # the image, and all the rest together


def test_pooling_and_flattening_share_one_scale_up_to_the_linear_layer() -> None:
    net = placed(Cnn, IMAGE)
    path = net.quantizer(net.only(aten.relu.default, 1))
    assert path is not None
    assert net.quantizer(net.only(aten.max_pool2d.default)) == path
    assert net.quantizer(net.only(aten.flatten.using_ints)) == path
    assert net.inputs_rounded(net.only(aten.linear.default))[0]


def test_a_concatenation_shares_one_scale_with_all_its_inputs() -> None:
    net = placed(lambda: Net(lambda x: torch.cat([functional.relu(x), functional.relu6(x)], 1), channels=8), IMAGE)
    paths = {net.quantizer(net.only(target)) for target in (aten.relu.default, aten.relu6.default, aten.cat.default)}
    assert None not in paths
    assert len(paths) == 1


def test_an_average_inside_a_chain_is_computed_on_rounded_values() -> None:
    net = placed(lambda: Net(lambda x: functional.avg_pool2d(functional.relu(x), 2)), IMAGE)
    average = net.only(aten.avg_pool2d.default)
    assert average.name in net.placement.compute
    assert net.inputs_rounded(average) == [True]
    assert net.quantizer(average) is not None
    assert net.quantizer(average) != net.quantizer(net.only(aten.relu.default))  # an average has its own range


class Sums(nn.Module):
    """Sums outside of any chain, with a number and with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(12))
        self.layer = nn.Linear(12, 12)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        inner = self.layer((left + right) + 1) + self.position
        return inner + inner


def test_a_sum_is_left_alone_where_it_gains_nothing() -> None:
    net = placed(Sums, MLP_DATA[:2], MLP_DATA[2:4])
    linear = net.only(aten.linear.default)
    assert net.placement.compute == (linear.name,)
    assert net.quantizer(linear) is None
    assert len(net.placement.activations) == 1


def test_a_net_of_linear_layers() -> None:
    net = placed(Mlp, MLP_DATA[:2])
    assert set(net.placement.weights.values()) == {"first.weight", "second.weight", "last.weight"}
    assert list(net.placement.activations.values()) == ["features", "relu", "relu_1"]
    assert net.quantizer(net.only(aten.linear.default, 2)) is None  # the output stays float


def test_depthwise_and_grouped_convolutions_have_one_scale_per_output_channel() -> None:
    net = placed(Depthwise, normal(2, 4, 8, 8))
    assert set(net.placement.weights.values()) == {
        f"{name}.weight" for name in ("pointwise", "depthwise", "grouped", "head")
    }
    for path in net.placement.weights:
        quantizer = net.graph_module.get_submodule(path)
        assert isinstance(quantizer, FakeQuantize)
        assert quantizer.scheme == weight_scheme(8, 0, reduced=False)


def test_integers_and_lookups_are_not_rounded() -> None:
    module = seeded(Transformer)
    batch = Batch((), {name: tensor[:2] for name, tensor in TEXT_DATA.items()}, None)
    net = Placed(captured(module, batch, TEXT_DYNAMIC, "logits"))
    assert not {"mask", "input_ids"} & set(net.placement.activations.values())
    assert net.quantizer(net.only(aten.embedding.default)) is not None
    assert len(net.placement.weights) == 6  # query, key, value, wide, narrow, head


class Queries(nn.Module):
    """A learned constant goes through a layer, as in DETR and Perceiver."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 12) + 1)
        self.query = nn.Linear(12, 12)
        self.key = nn.Linear(12, 12)

    def forward(self, features: Tensor) -> Tensor:
        return torch.softmax(self.query(self.queries[None]) @ self.key(features)[..., None], 1).squeeze(-1)


def test_a_parameter_is_no_activation() -> None:
    net = placed(Queries, MLP_DATA[:2])
    assert "queries" not in net.placement.weights.values()
    parameter = next(node for node in net.nodes if node.op == "get_attr" and node.target == "queries")
    assert net.quantizer(parameter) is None
    assert net.quantizer(net.only(aten.unsqueeze.default)) is not None  # what is made of it is


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(functional.relu(self.layer(features)))


def test_a_weight_used_twice_is_rounded_once() -> None:
    net = placed(Twice, MLP_DATA[:2])
    assert list(net.placement.weights.values()) == ["layer.weight"]
    assert all(all(net.inputs_rounded(net.only(aten.linear.default, position))[:2]) for position in (0, 1))


def test_weights_whose_names_differ_only_in_dots_are_kept_apart() -> None:
    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b_c": nn.Linear(12, 5)})
            self.a_b = nn.ModuleDict({"c": nn.Linear(5, 3)})

        def forward(self, features: Tensor) -> Tensor:
            return self.a_b["c"](self.a["b_c"](features))

    net = placed(Confusing, MLP_DATA[:2])
    assert sorted(net.placement.weights.values()) == ["a.b_c.weight", "a_b.c.weight"]
    first, last = (net.only(aten.linear.default, position).args[1] for position in (0, 1))
    assert isinstance(first, fx.Node)
    assert isinstance(last, fx.Node)
    assert net.placement.weights[str(first.target)] == "a.b_c.weight"
    assert net.placement.weights[str(last.target)] == "a_b.c.weight"


def test_a_net_without_layers_gets_no_quantizer() -> None:
    net = placed(Scaling, MLP_DATA[:2])
    assert (net.placement.activations, net.placement.weights, net.placement.compute) == ({}, {}, ())
    assert not any(node.op == "call_module" for node in net.nodes)


def test_quantizers_begin_switched_off_and_change_nothing() -> None:
    module = seeded(Cnn)
    net = Placed(captured(module, Batch((IMAGE,), {}, None)))
    with torch.no_grad():
        assert torch.allclose(net.graph_module(IMAGE), module(IMAGE), atol=1e-5)


def style_of(runtime: str, *, reduce: bool = False) -> Style:
    return style_for(Target(runtime, reduce_range=reduce))


class Attention(nn.Module):
    """Self-attention with two heads, tokens `[B, T, 8]`; the last layer's input is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_products_of_attention_are_rounded_as_the_runtime_wants(runtime: str) -> None:
    net = placed(Attention, normal(2, 5, 8), style=style_of(runtime))
    scores, mixed = net.only(aten.matmul.default), net.only(aten.matmul.default, 1)
    softmax = net.only(aten.softmax.int)
    assert net.inputs_rounded(scores) == net.inputs_rounded(mixed) == [True, True]
    assert {scores.name, mixed.name} <= set(net.placement.compute)
    operands = [quantizer.args[0] for quantizer in (*scores.args, mixed.args[1])]
    signed = runtime == "openvino"
    assert all(net.scheme(operand) == QuantScheme(signed=signed, symmetric=signed) for operand in operands)
    assert net.scheme(softmax) == QuantScheme()  # never negative: a sign would waste a bit
    assert mixed.args[0].args[0] is softmax
    assert net.quantizer(scores) is None  # what the softmax reads
    tokens = next(node for node in net.nodes if node.op == "placeholder")
    assert net.scheme(tokens) == QuantScheme()  # no product reads it


class Products(nn.Module):
    """Products with a constant, with itself, and outside of any chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5))
        self.layer = nn.Linear(5, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(torch.bmm(left, right)) @ torch.tanh(self.table)


def test_a_product_needs_two_values_that_vary() -> None:
    net = placed(Products, normal(2, 5, 5), normal(2, 5, 5, seed=1), style=style_of("openvino"))
    assert net.inputs_rounded(net.only(aten.bmm.default)) == [True, True]
    constant = net.only(aten.matmul.default)
    assert constant.name not in net.placement.compute
    assert net.inputs_rounded(constant) == [False, False]


def text(style: Style, **widths: Any) -> Placed:
    batch = Batch((), {name: tensor[:2] for name, tensor in TEXT_DATA.items()}, None)
    return Placed(captured(seeded(Transformer), batch, TEXT_DYNAMIC, "logits"), style, **widths)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(24, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


@pytest.mark.parametrize("reduce", [True, False])
def test_tables_are_stored_in_eight_bits_whatever_layers_have(reduce: bool) -> None:
    style = style_of("onnxruntime", reduce=reduce)
    net = placed(Lookup, torch.tensor([[1, 2], [3, 4]]), style=style, weight_bits=3, edge_bits=4)
    assert net.weight_scheme("table.weight") == weight_scheme(8, 0, reduced=False)  # no kernel that could overflow
    assert net.weight_scheme("head.weight") == weight_scheme(4, 0, reduced=reduce)
    (lookup,) = (node for node in net.nodes if node.target is aten.embedding.default)
    assert lookup.name in net.placement.compute
    kept = placed(Lookup, torch.tensor([[1, 2], [3, 4]]), style=style, overrides={"table": 32})
    assert list(kept.placement.weights.values()) == ["head.weight"]


def test_the_layer_decides_over_a_table_that_it_shares() -> None:
    (tied,) = {"embedding.weight", "head.weight"} & set(text(PLAIN).placement.weights.values())
    assert text(style_of("onnxruntime", reduce=True)).weight_scheme(tied).bits == 7  # its kernel would overflow
    assert text(Style(), edge_bits=5, weight_bits=5).weight_scheme(tied).bits == 5
    for name in ("embedding", "head"):  # one weight, one answer
        net = text(Style(), overrides={name: 32})
        assert tied not in net.placement.weights.values()
        assert len(net.placement.weights) == 5
        assert net.quantizer(next(node for node in net.nodes if node.target == tied)) is None
        assert net.only(aten.embedding.default).name not in net.placement.compute


class Up(nn.Module):
    """A convolution, a transposed one (grouped), a convolution; the decoder may share the encoder's weight."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.down, self.up = nn.Conv2d(4, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2, groups=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        small = functional.relu(self.down(image))
        large = functional.conv_transpose2d(small, self.down.weight, stride=2) if self.shared else self.up(small)
        return self.last(functional.relu(large))


def test_transposed_convolutions_are_rounded_where_they_have_kernels() -> None:
    for runtime in ("openvino", "eager"):
        net = placed(Up, normal(2, 4, 8, 8), style=style_of(runtime))
        up = net.only(aten.conv_transpose2d.input)
        assert net.inputs_rounded(up)[:2] == [True, True]
        assert up.name in net.placement.compute
        assert net.weight_scheme("up.weight") == weight_scheme(8, 1, reduced=False)
        assert net.quantizer(up) is None
    net = placed(Up, normal(2, 4, 8, 8), style=style_of("onnxruntime"))
    up = net.only(aten.conv_transpose2d.input)
    assert not any(net.inputs_rounded(up))
    assert sorted(net.placement.weights.values()) == ["down.weight", "last.weight"]
    with pytest.raises(ConfigError, match=r"\['up'\] fit no layer"):
        placed(Up, normal(2, 4, 8, 8), style=style_of("onnxruntime"), overrides={"up": 4})


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_weight_that_is_read_along_two_axes_stays_float(runtime: str) -> None:
    net = placed(lambda: Up(shared=True), normal(2, 4, 8, 8), style=style_of(runtime))
    assert list(net.placement.weights.values()) == ["last.weight"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_reach_weights_and_activations_and_spare_the_edges(bits: int) -> None:
    net = placed(Mlp, MLP_DATA[:2], weight_bits=bits, activation_bits=bits, edge_bits=7)
    edge = max(bits, 7)
    widths = {name: net.weight_scheme(f"{name}.weight").bits for name in ("first", "second", "last")}
    assert widths == {"first": edge, "second": bits, "last": edge}
    rounded = [net.scheme(net.only(aten.relu.default, position)).bits for position in (0, 1)]
    assert rounded == [bits, edge]  # what the second layer reads, what the last does
    assert net.scheme(next(node for node in net.nodes if node.op == "placeholder")).bits == edge


def test_a_layer_that_is_kept_in_float_reads_and_gives_float() -> None:
    net = placed(Mlp, MLP_DATA[:2], overrides={"sec*": 32})
    second = net.only(aten.linear.default, 1)
    assert not any(net.inputs_rounded(second))
    assert second.name not in net.placement.compute
    assert sorted(net.placement.weights.values()) == ["first.weight", "last.weight"]


def test_a_pattern_that_fits_no_layer_is_told() -> None:
    with pytest.raises(ConfigError, match=r"\['third'\] fit no layer; .*\['first', 'last', 'second'\]"):
        placed(Mlp, MLP_DATA[:2], overrides={"third": 4})
