from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.errors import CaptureError, OutputError
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    TWO_DATA,
    Branching,
    Cnn,
    Transformer,
    TwoInputs,
    captured,
    normal,
    relative,
    seeded,
)


def rows(data: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: tensor[:size] for name, tensor in data.items()}


class Named(nn.Module):
    """Its input has the name of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, add: Tensor) -> Tensor:
        return (self.layer(add) + 1) * add


class Three(nn.Module):
    """Three inputs, of which one plays no part."""

    def forward(self, first: Tensor, unused: Tensor, last: Tensor) -> Tensor:
        return 2 * first - last


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.cells(steps)[0][:, -1])


def test_parameters_keep_their_paths_and_values() -> None:
    module = seeded(Cnn)
    graph_module = captured(module, Batch((CNN_DATA[:2],), {}, None))
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    state = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    assert read == set(state)
    found = dict([*graph_module.named_parameters(), *graph_module.named_buffers()])
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_the_module_is_not_touched(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn).train()
    before = noticed(module)
    graph_module = captured(module, Batch((CNN_DATA[:2],), {}, None))
    with torch.no_grad():
        for tensor in [*graph_module.parameters(), *graph_module.buffers()]:
            tensor.zero_()
    assert noticed(module) == before


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_graph_answers_like_the_module_at_any_batch(size: int) -> None:
    module = seeded(Cnn)
    graph_module = captured(module, Batch((CNN_DATA[:2],), {}, None))
    with torch.no_grad():
        assert torch.allclose(graph_module(CNN_DATA[:size]), module(CNN_DATA[:size]), atol=1e-6)


def test_a_module_in_training_mode_is_captured_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.9)).train()
    graph_module = captured(module, Batch((MLP_DATA[:2],), {}, None))
    with torch.no_grad():
        assert torch.allclose(graph_module(MLP_DATA), module.eval()(MLP_DATA), atol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(tuple(rows(TWO_DATA, 2).values()), {}, None),
        Batch((TWO_DATA["image"][:2],), {"table": TWO_DATA["table"][:2]}, None),
        Batch((), rows(TWO_DATA, 2), None),
        Batch((), {"table": TWO_DATA["table"][:2], "image": TWO_DATA["image"][:2]}, None),
    ],
    ids=["positions", "both", "names", "names in another order"],
)
def test_inputs_keep_the_order_of_the_batch(batch: Batch) -> None:
    module = seeded(TwoInputs)
    graph_module = captured(module, batch)
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert names == ["image", "table"] or names == list(batch.kwargs)
    with torch.no_grad():
        found = graph_module(*(TWO_DATA[name] for name in names))
        assert torch.allclose(found, module(**TWO_DATA), atol=1e-6)


def test_several_dimensions_vary_and_the_declared_output_is_taken() -> None:
    module = seeded(Transformer)
    graph_module = captured(module, Batch((), rows(TEXT_DATA, 2), None), TEXT_DYNAMIC, "logits")
    for size, length in ((1, 6), (7, 3), (3, 1)):
        mask, ids = TEXT_DATA["mask"][:size, :length, :length], TEXT_DATA["input_ids"][:size, :length]
        with torch.no_grad():
            expected = module(input_ids=ids, mask=mask)["logits"]
            assert torch.allclose(graph_module(mask, ids), expected, atol=1e-5)


def test_an_undeclared_output_is_refused_saying_which_there_are() -> None:
    module = seeded(Transformer)
    with pytest.raises(OutputError, match="Task\\(output='hidden'\\)"):
        captured(module, Batch((), rows(TEXT_DATA, 2), None), TEXT_DYNAMIC)


@pytest.mark.parametrize(
    ("module", "dynamic"),
    [(Branching(), {}), (nn.Linear(12, 3), {"input": {1: "features"}})],
    ids=["data-dependent if", "fixed dimension declared dynamic"],
)
def test_what_cannot_be_traced_is_refused_with_the_reason(module: nn.Module, dynamic: Any) -> None:
    with pytest.raises(CaptureError, match=f"could not trace {type(module).__name__}: .*Target\\('eager'\\)"):
        captured(module, Batch((MLP_DATA[:2],), {}, None), dynamic)


def test_an_input_may_have_the_name_of_an_operator() -> None:
    module, x = seeded(Named), normal(5, 4)
    graph_module = captured(module, Batch((x[:2],), {}, None))
    assert len({node.name for node in graph_module.graph.nodes}) == len(graph_module.graph.nodes)
    with torch.no_grad():
        assert torch.allclose(graph_module(x), module(x), atol=1e-6)


def test_an_input_without_use_keeps_its_place() -> None:
    x, y, z = (normal(5, 4, seed=seed) for seed in range(3))
    graph_module = captured(Three(), Batch((x[:2], y[:2], z[:2]), {}, None))
    assert torch.allclose(graph_module(x, y, z), 2 * x - z)


def test_every_operator_knows_its_module() -> None:
    graph_module = captured(seeded(Cnn), Batch((CNN_DATA[:2],), {}, None))
    paths = {node.meta["module"] for node in graph_module.graph.nodes if node.target is torch.ops.aten.conv2d.default}
    assert paths == {"stem", "block.0"}
    linear = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert linear.meta["module"] == "head"


def test_a_recurrent_network_is_captured_without_a_warning() -> None:
    module, x = seeded(Recurrent), normal(5, 4, 8)
    graph_module = captured(module, Batch((x[:2],), {}, None))  # warnings are errors in these tests
    with torch.no_grad():
        assert torch.allclose(graph_module(x), module(x), atol=1e-6)


def test_tied_parameters_and_modules_used_twice_are_captured() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)
            self.tied = nn.Linear(12, 12, bias=False)
            self.tied.weight = self.layer.weight

        def forward(self, features: Tensor) -> Tensor:
            return self.tied(functional.relu(self.layer(functional.relu(self.layer(features)))))

    module = seeded(Twice)
    graph_module = captured(module, Batch((MLP_DATA[:2],), {}, None))
    with torch.no_grad():
        assert relative(graph_module(MLP_DATA), module(MLP_DATA)) < 1e-6
