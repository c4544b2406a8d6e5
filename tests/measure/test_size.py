"""Parameters, multiply-accumulates and bytes, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.quantization import QuantPlan, QuantScheme, TensorQuant
from tersor.measure import file_bytes, layer_table, mac_counts, parameter_counts
from tersor.measure.size import weight_error


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(tokens))
        return logits


class Attention(nn.Module):
    """Fused attention, which has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def batch(*shape: int) -> Batch:
    return Batch((torch.zeros(shape),), {}, None)


def plan(path: str, scale: list[float], axis: int | None = 0) -> QuantPlan:
    scheme = QuantScheme(bits=8, signed=True, symmetric=True, axis=axis)
    return QuantPlan(
        tensors=[TensorQuant(name=path, role="weight", scheme=scheme, scale=scale, zero_point=[0] * len(scale))]
    )


def test_bytes_are_those_on_disk(tmp_path: Path) -> None:
    for name, size in (("a.bin", 7), ("b.bin", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert file_bytes([tmp_path / "a.bin", tmp_path / "b.bin"]) == {"a.bin": 7, "b.bin": 0}


def test_parameters_and_zeros() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.weight[0, :2] = 0
        layer.bias.fill_(1)
    assert parameter_counts(layer) == (15, 13)


def test_tied_parameters_count_once() -> None:
    assert parameter_counts(Tied()) == (40, 40)


@pytest.mark.parametrize(
    ("module", "example", "expected"),
    [
        (nn.Linear(5, 7), batch(1, 5), 5 * 7),
        (nn.Linear(5, 7), batch(3, 5), 3 * 5 * 7),
        (nn.Conv2d(3, 8, 3, padding=1), batch(1, 3, 6, 6), 8 * 3 * 9 * 36),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), batch(1, 3, 6, 6), 8 * 3 * 9 * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), batch(1, 8, 6, 6), 8 * 9 * 36),
        (nn.Conv1d(4, 2, 5), batch(1, 4, 9), 2 * 4 * 5 * 5),
        (nn.ConvTranspose2d(4, 2, 2, stride=2), batch(1, 4, 3, 3), 4 * 2 * 4 * 9),
        (nn.ReLU(), batch(1, 5), 0),
        (nn.LSTM(6, 5, batch_first=True), batch(1, 4, 6), 4 * (6 * 20 + 5 * 20)),
        (nn.GRU(6, 5, batch_first=True, bidirectional=True), batch(1, 4, 6), 2 * 4 * (6 * 15 + 5 * 15)),
        (Attention(), batch(1, 2, 5, 8), 2 * (2 * 5 * 5 * 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), batch(1, 5, 8), 5 * (4 * 64 + 2 * 5 * 8 + 2 * 128)),
    ],
    ids=["linear", "linear batch 3", "conv", "stride", "depthwise", "conv1d", "transposed", "none", "lstm", "gru",
         "attention", "encoder layer"],
)  # fmt: skip
def test_multiply_accumulates_are_right(module: nn.Module, example: Batch, expected: int) -> None:
    assert mac_counts(module, example)[""] == expected


def test_multiply_accumulates_by_layer_sum_to_the_whole() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 10)))
    counts = mac_counts(net, batch(1, 1, 6, 6))
    assert counts["0"] == 4 * 9 * 16
    assert counts["2.1"] == counts["2"] == 640
    assert counts[""] == counts["0"] + counts["2.1"]


def test_inputs_by_name_are_counted() -> None:
    example = Batch((), {"tokens": torch.zeros(1, 3, dtype=torch.long)}, None)
    assert mac_counts(Tied(), example)[""] == 3 * 4 * 10


def test_counting_leaves_every_mode_and_buffer_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    net.train()
    net[1].eval()  # a frozen BatchNorm inside a model that trains
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mac_counts(net, batch(2, 1, 5, 5))
    assert torch.backends.mha.get_fastpath_enabled()
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_counting_restores_the_modes_of_a_model_that_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).train()
    with pytest.raises(RuntimeError):
        mac_counts(net, batch(1, 4))
    assert net.training


def test_the_table_has_one_row_for_each_module_with_parameters() -> None:
    original = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    deployed = nn.Sequential(*[type(layer)() if layer is original[2] else layer for layer in original])
    rows = layer_table(original, deployed, plan("0.weight", [0.1, 0.1]), mac_counts(original, batch(1, 1, 4, 4)))
    assert [(row.name, row.kind, row.parameters, row.macs, row.precision) for row in rows] == [
        ("0", "Conv2d", 18, 2 * 9 * 4, "int8"),
        ("1", "BatchNorm2d", 4, 0, "float32"),
        ("4", "Linear", 27, 24, "float32"),
    ]
    assert rows[1].nonzero_parameters == 2  # a new BatchNorm's shift is zero
    assert rows[1].weight_error is None
    assert rows[2].weight_error == 0


def test_weight_error_is_the_relative_distance() -> None:
    before, after = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        before.weight.copy_(torch.tensor([[3.0, 4.0]]))
        after.weight.copy_(torch.tensor([[0.0, 4.0]]))
    assert weight_error(before, after, "weight") == pytest.approx(3 / 5)
    assert weight_error(before, before, "weight") == 0
    assert weight_error(before, nn.Linear(3, 1, bias=False), "weight") is None
    assert weight_error(nn.Identity(), after, "weight") is None


def test_weight_error_of_a_zero_weight_is_a_number() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    assert weight_error(layer, layer, "weight") == 0
