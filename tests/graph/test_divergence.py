from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from tersor.core.batch import Batch
from tersor.graph import first_divergence
from tersor.graph.divergence import relative_error
from zoo import CNN_DATA, Cnn, captured, normal, seeded

Values = dict[str, np.ndarray[Any, Any]]


class Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.found[n.name] = result.detach().numpy()
        return result


def values(graph_module: fx.GraphModule) -> Values:
    recorder = Recorder(graph_module)
    with torch.no_grad():
        recorder.run(CNN_DATA)
    return recorder.found


@pytest.fixture(scope="module")
def graph_module() -> fx.GraphModule:
    return captured(seeded(Cnn), Batch((CNN_DATA[:2],), {}, None))


@pytest.mark.parametrize(
    ("parameter", "module"),
    [("stem.weight", "stem"), ("stem_norm.bias", "stem_norm"), ("block.0.bias", "block.0"), ("head.weight", "head")],
)
@pytest.mark.parametrize("damage", [3.0, float("nan")])
def test_the_first_module_that_differs_is_named(
    graph_module: fx.GraphModule, parameter: str, module: str, damage: float
) -> None:
    other = copy.deepcopy(graph_module)
    with torch.no_grad():
        other.get_parameter(parameter).flatten()[0] += damage
    found = first_divergence(graph_module, [CNN_DATA], lambda names: values(other), 1e-3)
    assert found is not None
    name, where, error = found
    assert where == module
    assert error > 1e-3
    assert next(node for node in graph_module.graph.nodes if node.name == name).meta["module"] == module


def test_equal_graphs_do_not_diverge(graph_module: fx.GraphModule) -> None:
    asked: list[Sequence[str]] = []

    def same(names: Sequence[str]) -> Values:
        asked.append(names)
        return values(graph_module)

    assert first_divergence(graph_module, [CNN_DATA], same, 1e-6) is None
    names = [node.name for node in graph_module.graph.nodes if node.op == "call_function"]
    assert list(asked[0]) == names  # every value, in the order of execution


def test_values_that_the_other_side_does_not_know_are_skipped(graph_module: fx.GraphModule) -> None:
    other = copy.deepcopy(graph_module)
    with torch.no_grad():
        other.get_parameter("stem.weight").mul_(2)
    assert first_divergence(graph_module, [CNN_DATA], lambda names: {}, 1e-3) is None
    later = {name: value for name, value in values(other).items() if name.startswith("linear")}
    found = first_divergence(graph_module, [CNN_DATA], lambda names: later, 1e-3)
    assert found is not None
    assert found[1] == "head"


def test_differences_below_the_tolerance_are_accepted(graph_module: fx.GraphModule) -> None:
    close = {name: value * 1.001 for name, value in values(graph_module).items()}
    assert first_divergence(graph_module, [CNN_DATA], lambda names: close, 1.2e-3) is None
    assert first_divergence(graph_module, [CNN_DATA], lambda names: close, 0.8e-3) is not None


@pytest.mark.parametrize(("value", "module"), [("relu", "stem_norm"), ("add", "block.1"), ("max_pool2d", "pool")])
def test_a_value_that_a_function_made_belongs_to_what_was_computed_last_before_it(
    graph_module: fx.GraphModule, value: str, module: str
) -> None:
    wrong = values(graph_module)[value] + 1
    found = first_divergence(graph_module, [CNN_DATA], lambda names: {value: wrong}, 1e-3)
    assert found is not None
    assert found[:2] == (value, module)


def test_relative_error_by_hand() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([0.0, 0.2]), torch.zeros(2)) == pytest.approx(0.2)
    assert relative_error(normal(3), expected) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    assert relative_error(torch.tensor([3.0, float("inf")]), expected) == float("inf")
