from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.probe import Evidence, collect, columns
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    Cnn,
    Depthwise,
    Mlp,
    SharedTower,
    Transformer,
    integers,
    normal,
    relative,
    seeded,
    state_hash,
)

ALL = ("gradient", "squared_gradient", "movement", "gram", "zero_share")
LABELS = integers(4, 48)
BATCHES = [(MLP_DATA[:20], LABELS[:20]), (MLP_DATA[20:], LABELS[20:])]


def field(found: dict[str, Evidence], path: str, name: str) -> Tensor:
    value = getattr(found[path], name)
    assert isinstance(value, Tensor)
    return value


def conv1d(width_in: int, width_out: int) -> nn.Module:
    """A layer as transformers' `Conv1D`: weight `[in, out]`."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(width_in, width_out))
            self.bias = nn.Parameter(torch.zeros(width_out))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    return Conv1D()


def test_the_model_is_left_bit_identical() -> None:
    model = seeded(Cnn).train()
    model.get_submodule("block").eval()
    model.get_parameter("stem.weight").requires_grad_(False)
    (model(CNN_DATA).square().sum()).backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    before = state_hash(model)
    collect(model, [(CNN_DATA, integers(5, 48))], needs=ALL, loss=functional.cross_entropy)
    assert state_hash(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not model.get_parameter("stem.weight").requires_grad
    assert model.get_parameter("head.weight").requires_grad
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert parameter.grad is None if expected is None else torch.equal(parameter.grad, expected)  # type: ignore[arg-type]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_left_alone_after_an_error_as_well() -> None:
    model = seeded(Mlp).train()
    with pytest.raises(NonFiniteError, match="batch 1"):
        collect(model, [MLP_DATA, torch.full((3, 12), torch.nan)], needs=["gram"])
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_gradients_are_those_of_autograd() -> None:
    model = seeded(Mlp)
    found = collect(model, BATCHES, needs=["gradient", "squared_gradient"], loss=functional.cross_entropy)
    functional.cross_entropy(model(MLP_DATA), LABELS).backward()  # type: ignore[no-untyped-call]
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative(field(found, path, "gradient"), parameter.grad) < 1e-5
    singles = []
    for x, y in BATCHES:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        singles.append(copy.deepcopy(model.get_parameter("second.weight").grad))
    expected = (20 * singles[0].square() + 28 * singles[1].square()) / 48  # type: ignore[union-attr]
    assert relative(field(found, "second.weight", "squared_gradient"), expected) < 1e-5


def test_batches_of_one_example_give_the_empirical_fisher_information() -> None:
    model = seeded(Mlp)
    singles = [(MLP_DATA[index : index + 1], LABELS[index : index + 1]) for index in range(48)]
    found = collect(model, singles, needs=["squared_gradient"], loss=functional.cross_entropy, parameters=["last.bias"])
    shares = torch.softmax(model(MLP_DATA), 1).detach() - functional.one_hot(LABELS, 4)
    assert set(found) == {"last.bias"}
    assert relative(field(found, "last.bias", "squared_gradient"), shares.square().mean(0)) < 1e-5


def test_movement_is_that_of_plain_gradient_steps() -> None:
    model = seeded(Mlp)
    found = collect(model, BATCHES, needs=["movement"], loss=functional.cross_entropy, learning_rate=0.1)
    trained, expected = copy.deepcopy(model), torch.zeros(16, 12)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for x, y in BATCHES:
        optimizer.zero_grad()
        functional.cross_entropy(trained(x), y).backward()  # type: ignore[no-untyped-call]
        weight = trained.get_parameter("first.weight")
        assert weight.grad is not None
        expected -= 0.1 * weight.detach() * weight.grad
        optimizer.step()
    assert relative(field(found, "first.weight", "movement"), expected) < 1e-5


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 6)),
        (lambda: nn.Linear(6, 4), (5, 7, 6)),
        (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (5, 3, 9)),
        (lambda: nn.Conv1d(3, 4, 2), (3, 9)),
        (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 8, 9)),
        (lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(1, 2)), (5, 3, 8, 9)),
        (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (5, 3, 8, 9)),
        (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (5, 6, 5, 5)),
        (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (5, 6, 5, 5)),
        (lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1)), (3, 2, 4, 5, 6)),
        (lambda: conv1d(6, 4), (5, 7, 6)),
    ],
)
def test_the_gram_predicts_the_energy_of_the_outputs_exactly(
    layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """``E‖W x‖² = tr(W · gram · Wᵀ)`` for every W: holds for the right columns in the right order, for nothing else."""
    module = seeded(layer)
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    with torch.no_grad():
        bias.zero_()
    inputs = normal(*shape)
    found = collect(module, [inputs[:2], inputs[2:]] if shape[0] == 5 else [inputs], needs=["gram"])
    gram, output_dim = field(found, "weight", "gram"), found["weight"].output_dim
    channel = {"Linear": -1, "Conv1D": -1}.get(type(module).__name__, -len(weight.shape) + 1)
    for seed in range(3):
        with torch.no_grad():
            weight.copy_(normal(*weight.shape, seed=seed))
            outputs = module(inputs).movedim(channel, -1).flatten(0, -2)
        matrix = weight.detach().movedim(output_dim, 0).flatten(1)
        grams = (
            gram.expand(matrix.shape[0], *gram.shape)
            if gram.ndim == 2
            else gram.repeat_interleave(matrix.shape[0] // len(gram), dim=0)
        )
        expected = torch.einsum("ok,okl,ol->o", matrix, grams, matrix)
        assert relative(outputs.square().mean(0), expected) < 1e-5


def test_large_inputs_are_sampled_alike_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Cnn)
    exact = field(collect(model, [CNN_DATA] * 20, needs=["gram"]), "block.0.weight", "gram")
    monkeypatch.setattr(columns, "SAMPLE", 500)
    sampled = field(collect(model, [CNN_DATA] * 20, needs=["gram"]), "block.0.weight", "gram")
    again = field(collect(model, [CNN_DATA] * 20, needs=["gram"]), "block.0.weight", "gram")
    assert torch.equal(sampled, again)
    assert 0 < relative(sampled, exact) < 0.1


def test_zeros_are_counted_behind_the_norm_that_follows() -> None:
    model = seeded(Cnn)
    found = collect(model, [CNN_DATA[:30], CNN_DATA[30:]], needs=["zero_share"])
    with torch.no_grad():
        stem = functional.relu(model.get_submodule("stem_norm")(model.get_submodule("stem")(CNN_DATA)))
        head = model(CNN_DATA)
    assert torch.allclose(field(found, "stem.weight", "zero_share"), (stem == 0).float().mean((0, 2, 3)))
    assert torch.allclose(field(found, "head.weight", "zero_share"), (head <= 0).float().mean(0))
    assert found["stem_norm.weight"].zero_share is None


def test_a_relu_in_place_does_not_disturb_the_count() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.LayerNorm(3))
    found = collect(model, [MLP_DATA], needs=["zero_share"])
    with torch.no_grad():
        assert torch.allclose(field(found, "0.weight", "zero_share"), (model[:2](MLP_DATA) == 0).float().mean(0))
        assert torch.allclose(field(found, "2.weight", "zero_share"), (model(MLP_DATA) <= 0).float().mean(0))


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    model = seeded(SharedTower)
    left, right = normal(6, 4, 8), normal(6, 5, 8, seed=1)
    found = collect(model, [{"left": left, "right": right[:, :4]}], needs=["gram"])
    rows = torch.cat([left.flatten(0, 1), right[:, :4].flatten(0, 1)])
    assert relative(field(found, "encoder.weight", "gram"), rows.T @ rows / len(rows)) < 1e-5


def test_a_dict_model_with_tied_weights() -> None:
    model = seeded(Transformer)

    def loss(outputs: Any, labels: Any) -> Tensor:
        assert labels is None
        total: Tensor = outputs["logits"].square().mean()
        return total

    found = collect(model, [TEXT_DATA], needs=["gradient", "gram"], loss=loss)
    tied = found["embedding.weight"]
    assert (tied.role, tied.output_dim) == ("weight", 0)  # the layer that taps know decides
    assert field(found, "embedding.weight", "gram").shape == (16, 16)
    assert "head.weight" not in found


def test_roles_need_no_data() -> None:
    found = collect(seeded(Cnn), (), needs=())
    assert {path: known.role for path, known in found.items()} == {
        "stem.weight": "weight",
        "stem_norm.weight": "scale",
        "stem_norm.bias": "bias",
        "block.0.weight": "weight",
        "block.0.bias": "bias",
        "block.1.weight": "scale",
        "block.1.bias": "bias",
        "head.weight": "weight",
        "head.bias": "bias",
    }
    others = nn.ModuleList(
        [nn.Embedding(5, 3), nn.ConvTranspose2d(2, 4, 3), nn.LSTM(2, 3), nn.PReLU(4), nn.LayerNorm(4)]
    )
    told = collect(others, (), needs=())
    assert [told[path].output_dim for path in ("0.weight", "1.weight", "2.weight_ih_l0")] == [1, 1, 0]
    assert [told[path].role for path in ("2.bias_hh_l0", "3.weight", "4.weight")] == ["bias", "other", "scale"]


def test_what_never_ran_stays_unknown() -> None:
    model = nn.ModuleDict(
        {"used": nn.Linear(12, 4), "idle": nn.Linear(12, 4), "deconvolution": nn.ConvTranspose1d(1, 2, 3)}
    )
    model.forward = lambda x: model["deconvolution"](model["used"](x)[:, None])  # type: ignore[method-assign,assignment]
    found = collect(model, [(MLP_DATA, LABELS)], needs=ALL, loss=lambda outputs, _: outputs.square().mean())
    assert found["used.weight"].gram is not None
    assert found["idle.weight"] == Evidence(role="weight")
    assert found["deconvolution.weight"].gram is None
    assert found["deconvolution.weight"].gradient is not None


def test_attention_in_evaluation_mode_does_not_pass_the_taps_by() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        found = collect(model, [normal(4, 5, 8)], needs=["gram"])
    assert found["linear1.weight"].gram is not None
    assert found["self_attn.in_proj_weight"].gram is None  # computed without calling a module


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, DataError, "no batch"),
        ({"needs": ["gradient"]}, ConfigError, "loss="),
        ({"needs": ["hessian"]}, ConfigError, "hessian"),
        ({"parameters": ["nowhere"]}, ConfigError, "nowhere"),
        ({"batches": ["text"]}, DataError, "batch 0"),
    ],
)
def test_what_cannot_work_is_said(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"batches": [MLP_DATA], "needs": ["gram"]} | arguments
    with pytest.raises(error, match=message):
        collect(seeded(Mlp), given.pop("batches"), **given)


def test_a_bad_value_is_named_with_its_batch() -> None:
    model, huge = seeded(Mlp), torch.full((3, 12), 1e30)
    with pytest.raises(NonFiniteError, match=r"batch 1.*'first'"):
        collect(model, [MLP_DATA, huge], needs=["gram"])
    losses = iter([1.0, float("nan")])
    with pytest.raises(NonFiniteError, match=r"batch 1.*the loss is nan"):
        collect(model, BATCHES, needs=["gradient"], loss=lambda outputs, _: outputs.mean() * next(losses))
    with pytest.raises(NonFiniteError, match=r"batch 0.*gradient of 'first.weight'"):
        collect(model, BATCHES, needs=["movement"], loss=lambda outputs, _: (outputs * 0).sqrt().sum())
    with torch.no_grad():
        model.get_parameter("last.bias")[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"batch 0.*output"):
        collect(model, BATCHES, needs=["zero_share"])


def test_grouped_convolutions_have_a_gram_per_group() -> None:
    found = collect(seeded(Depthwise), [normal(4, 4, 8, 8)], needs=["gram"])
    assert field(found, "depthwise.weight", "gram").shape == (8, 9, 9)
    assert field(found, "grouped.weight", "gram").shape == (2, 36, 36)
