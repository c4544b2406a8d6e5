"""A run that stops anywhere gives what a run in one go gives, and remembers no more than it must."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from recovery_zoo import Learned, Parallel, ready
from tersor.core.batch import Batch
from tersor.graph.rules import COMPUTE
from tersor.graph.stream import Stream, call, run, segments, varying
from zoo import MLP_DATA, TEXT_DATA, TEXT_DYNAMIC, Cnn, Mlp, Transformer, captured, normal, seeded

IMAGE = normal(3, 3, 8, 8)
TEXT = {name: tensor[:3] for name, tensor in TEXT_DATA.items()}


def graph_of(case: str) -> tuple[fx.GraphModule, list[tuple[Tensor, ...]]]:
    """A graph, and batches of different sizes for it."""
    if case == "transformer":
        graph = captured(seeded(Transformer), Batch((), TEXT, None), TEXT_DYNAMIC, "logits")
        short = tuple(value[(slice(2), *[slice(4)] * (value.ndim - 1))] for value in TEXT.values())
        return graph, [tuple(TEXT.values()), short]
    build, data = {"cnn": (Cnn, IMAGE), "parallel": (Parallel, IMAGE), "learned": (Learned, MLP_DATA[:3])}[case]
    return captured(seeded(build), Batch((data,), {}, None)), [(data,), (data[:2] * 2,)]


once = cache(graph_of)
CASES = ["cnn", "parallel", "learned", "transformer"]


def values_of(graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, object]:
    """Every value by an ordinary run."""
    kept: dict[str, object] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            found = super().run_node(node)
            kept[node.name] = found.clone() if isinstance(found, Tensor) else found
            return found

    with torch.no_grad():
        Keeping(graph_module).run(*(value.clone() for value in inputs))
    return kept


@pytest.mark.parametrize("case", CASES)
def test_stopping_at_every_node_gives_what_an_ordinary_run_gives(case: str) -> None:
    graph_module, batches = graph_of(case)
    expected = [values_of(graph_module, batch) for batch in batches]
    stream = Stream(graph_module, batches)
    with torch.no_grad():
        for node in varying(graph_module):
            for found, wanted in zip(stream.advance(node), expected, strict=True):
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted[node.name])), node


@given(stops=st.sets(st.integers(0, 100), min_size=1), case=st.sampled_from(CASES))
@settings(max_examples=12, deadline=None)
def test_any_stops_on_the_way_change_nothing(stops: set[int], case: str) -> None:
    graph_module, batches = once(case)
    nodes = varying(graph_module)
    stream = Stream(graph_module, batches)
    with torch.no_grad():
        for stop in sorted(stop % len(nodes) for stop in stops):
            stream.advance(nodes[stop])
        found = stream.advance(nodes[-1])
        for value, batch in zip(found, batches, strict=True):
            assert torch.equal(value, graph_module(*(part.clone() for part in batch)))


def test_few_values_are_alive_at_a_time() -> None:
    net = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(12, 12), nn.ReLU())])
    graph_module = captured(seeded(lambda: net), Batch((MLP_DATA[:2],), {}, None))
    stream = Stream(graph_module, [(MLP_DATA[:2],), (MLP_DATA[:3],)])
    for node in varying(graph_module):
        stream.advance(node)
        assert [len(environment) for environment in stream.environments] == [1, 1]
    residual, batches = graph_of("cnn")
    stream = Stream(residual, batches)
    alive = []
    for node in varying(residual):
        stream.advance(node)
        alive.append(len(stream.environments[0]))
    assert max(alive) == 2  # the branch and what it is added to
    assert alive[-1] == 1


def test_a_value_that_is_read_again_stays_until_then() -> None:
    graph_module, batches = graph_of("cnn")
    stream = Stream(graph_module, batches)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    stream.advance(nodes["conv2d_1"])
    assert nodes["relu"] in stream.environments[0]
    stream.advance(nodes["add"])
    assert nodes["relu"] not in stream.environments[0]


def test_a_look_ahead_changes_nothing_and_sees_changed_weights() -> None:
    graph_module, batches = graph_of("cnn")
    stream = Stream(graph_module, batches)
    layer = next(node for node in varying(graph_module) if node.name == "conv2d_1")
    with torch.no_grad():
        source = stream.advance(layer.all_input_nodes[0])
        before = [dict(environment) for environment in stream.environments]
        first = stream.peek(layer)
        graph_module.get_parameter("block.0.weight").mul_(2)
        graph_module.get_parameter("block.0.bias").mul_(2)
        second = stream.peek(layer)
        assert all(torch.allclose(b, 2 * a, atol=1e-5) for a, b in zip(first, second, strict=True))
        assert [list(old) for old in before] == [list(environment) for environment in stream.environments]
        assert all(torch.equal(a, b) for a, b in zip(source, stream.advance(layer.all_input_nodes[0]), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(second, stream.advance(layer), strict=True))


def test_looking_ahead_at_an_operator_that_writes_in_place_changes_nothing() -> None:
    graph_module, batches = graph_of("parallel")
    (total,) = (node for node in graph_module.graph.nodes if node.target is torch.ops.aten.add_.Tensor)
    stream = Stream(graph_module, batches)
    with torch.no_grad():
        for used in total.all_input_nodes:
            stream.advance(used)
        first, second = stream.peek(total), stream.peek(total)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        environment = dict(stream.environments[0])
        once, again = (run(graph_module, [total], environment) for _ in range(2))
        assert torch.equal(once, again)


def test_the_callers_tensors_stay_as_they_are() -> None:
    class InPlace(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features.relu_() + 1

    given_values = MLP_DATA[:2].clone()
    graph_module = captured(InPlace(), Batch((MLP_DATA[:2].clone(),), {}, None))
    stream = Stream(graph_module, [(given_values,)])
    stream.advance(varying(graph_module)[-1])
    assert torch.equal(given_values, MLP_DATA[:2])


def test_what_parameters_alone_make_does_not_vary() -> None:
    graph_module, _ = graph_of("learned")
    names = {node.name for node in varying(graph_module)}
    constant = [node for node in graph_module.graph.nodes if node.op == "call_function" and node.name not in names]
    assert any(node.target is torch.ops.aten.linear.default for node in constant)
    with torch.no_grad():
        layer = next(node for node in constant if node.target is torch.ops.aten.linear.default)
        assert call(graph_module, layer, {}).shape == (1, 5, 1, 12)


def names_of(case: str) -> list[list[str]]:
    """The segments of a graph whose layers and sums are marked, without what only moves or activates."""
    graph_module, _ = graph_of(case)
    marked = {node for node in graph_module.graph.nodes if node.target in COMPUTE}
    return [[node.name for node in segment] for segment in segments(graph_module, marked)]


def test_a_plain_net_is_cut_behind_every_layer() -> None:
    graph_module = captured(seeded(Mlp), Batch((MLP_DATA[:2],), {}, None))
    marked = {node for node in graph_module.graph.nodes if node.target in COMPUTE}
    found = [[node.name for node in segment] for segment in segments(graph_module, marked)]
    assert found == [["linear"], ["relu", "linear_1"], ["relu_1", "linear_2"]]


def test_a_residual_net_is_cut_around_its_blocks() -> None:
    found = names_of("cnn")
    assert found == [
        ["conv2d"],
        ["batch_norm", "relu", "conv2d_1", "batch_norm_1", "add"],
        ["relu_1", "max_pool2d", "flatten", "linear"],
    ]


def test_a_mask_may_cross_the_cuts_of_a_transformer() -> None:
    found = names_of("transformer")
    flat = [name for segment in found for name in segment]
    assert len(flat) == len(set(flat))
    (block,) = (segment for segment in found if "softmax" in segment)
    assert {"linear", "linear_1", "linear_2", "matmul", "matmul_1", "masked_fill", "add"} <= set(block)
    assert block[-1] == "add"
    assert "linear_3" not in block
    assert "eq" in flat  # of the mask: before the block, and read in it


def test_a_size_is_no_value_that_forbids_a_cut() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, features: Tensor) -> Tensor:
            hidden = self.first(features)
            size = hidden.size(0)
            return self.third(self.second(hidden).reshape(size, 2, 6).flatten(1)).reshape(size, 3, 4)

    graph_module = captured(seeded(Sized), Batch((MLP_DATA[:2],), {}, None))
    marked = {node for node in graph_module.graph.nodes if node.target in COMPUTE}
    found = segments(graph_module, marked)
    assert [sum(node in marked for node in segment) for segment in found] == [1, 1, 1]


@pytest.mark.parametrize("case", CASES)
def test_a_run_segment_by_segment_is_a_run(case: str) -> None:
    graph_module, batches = graph_of(case)
    marked = {node for node in graph_module.graph.nodes if node.target in COMPUTE}
    stream = Stream(graph_module, batches)
    with torch.no_grad():
        for segment in segments(graph_module, marked):
            inside = set(segment)
            for used in {used for node in segment for used in node.all_input_nodes} - inside:
                if used in stream.varying:
                    stream.advance(used)
            expected = [run(graph_module, segment, environment) for environment in stream.environments]
            found = stream.advance(segment[-1])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_quantized_graph_runs_like_any_other() -> None:
    prepared = ready(Cnn, normal(7, 3, 8, 8), batch_size=4).prepared
    stream = Stream(prepared.simulation, [(normal(7, 3, 8, 8),)])
    with torch.no_grad():
        (found,) = stream.advance(varying(prepared.simulation)[-1])
        assert torch.equal(found, prepared.simulation(normal(7, 3, 8, 8)))
        assert not torch.equal(found, functional.relu(found))
