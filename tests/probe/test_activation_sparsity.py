from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.split import Split
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.probe.activation_sparsity import activation_sparsity, thresholds, with_thresholds
from zoo import CNN_DATA, MLP_DATA, TEXT_DATA, Cnn, Mlp, Transformer, normal, seeded


def relu_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def test_zeros_of_a_relu_are_counted_exactly(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(relu_net)
    before = noticed(module)
    found = activation_sparsity(module, [MLP_DATA[:30], MLP_DATA[30:]], tolerance=0.1)
    assert noticed(module) == before
    hidden = module[1](module[0](MLP_DATA))
    assert list(found) == ["0", "1", "2"]
    assert found["1"].values == hidden.numel()
    assert found["1"].zeros == int((hidden == 0).sum())
    assert found["1"].near_zeros == int((hidden.abs() <= 0.1).sum())
    assert 0.3 < found["1"].sparsity < found["1"].near_sparsity < 0.9
    assert found["0"].sparsity == 0


def test_functional_zeros_are_seen_where_they_flow_in() -> None:
    found = activation_sparsity(seeded(Mlp), [MLP_DATA], side="input")
    assert found["first"].sparsity == 0
    assert found["second"].sparsity > 0.2
    only = activation_sparsity(seeded(Mlp), Split("x", MLP_DATA).batches(16), side="input", modules=["second"])
    assert list(only) == ["second"]
    assert only["second"] == found["second"]


@pytest.mark.parametrize("wanted", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("build", [Mlp, Cnn])
def test_thresholds_give_the_share_that_was_wanted(build: Callable[[], nn.Module], wanted: float) -> None:
    module, data = seeded(build), MLP_DATA if build is Mlp else CNN_DATA
    limits = thresholds(module, [data], wanted)
    first = next(iter(limits))  # deeper layers see what earlier ones cut
    cut = with_thresholds(module, limits)
    share = activation_sparsity(module, [data], side="input")[first]
    assert share.sparsity == 0
    values = data.abs().flatten()
    assert float((values < limits[first]).double().mean()) == pytest.approx(wanted, abs=0.002)
    assert float((values < limits[first]).double().mean()) >= wanted
    seen: list[Tensor] = []
    cut.get_submodule(first).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    cut(data)
    assert torch.equal(seen[0], data * (data.abs() >= limits[first]))
    assert (wanted == 0) == torch.equal(cut(data), module(data))


def test_what_is_zero_already_counts() -> None:
    module = seeded(Mlp)
    share = activation_sparsity(module, [MLP_DATA], side="input", modules=["second"])["second"].sparsity
    limits = thresholds(module, [MLP_DATA], share / 2, modules=["second"])
    assert 0 <= limits["second"] < 1e-40
    assert torch.equal(with_thresholds(module, limits)(MLP_DATA), module(MLP_DATA))


def test_the_copy_keeps_names_and_can_be_copied_and_sent(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(relu_net)
    before = noticed(module)
    cut = with_thresholds(module, {"1": 0.5}, side="output")
    assert noticed(module) == before
    assert list(cut.state_dict()) == list(module.state_dict())
    expected = module[2](torch.where(module[1](module[0](MLP_DATA)) < 0.5, 0, module[1](module[0](MLP_DATA))))
    for again in (cut, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):  # noqa: S301 - our own
        assert torch.equal(again(MLP_DATA), expected)
    assert activation_sparsity(cut, [MLP_DATA])["1"].sparsity > activation_sparsity(module, [MLP_DATA])["1"].sparsity


def test_a_model_with_cuts_can_be_exported() -> None:
    cut = with_thresholds(seeded(Mlp), {"second": 0.3})
    program = torch.export.export(cut, (MLP_DATA,)).module()
    assert torch.allclose(program(MLP_DATA), cut(MLP_DATA))


def test_integers_and_dicts_pass() -> None:
    module = seeded(Transformer)
    limits = thresholds(module, [TEXT_DATA], 0.5)
    assert "embedding" not in limits  # token numbers are no activations
    cut = with_thresholds(module, limits)
    assert not torch.equal(cut(**TEXT_DATA)["logits"], module(**TEXT_DATA)["logits"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda module: activation_sparsity(module, [MLP_DATA], tolerance=-1.0), "tolerance"),
        (
            lambda module: activation_sparsity(module, [MLP_DATA], modules=["third"]),
            r"\['third'\] are no modules of Mlp",
        ),
        (lambda module: thresholds(module, [MLP_DATA], 1.0), r"sparsity must be in \[0, 1\)"),
        (lambda module: with_thresholds(module, {"third": 1.0}), "no modules"),
        (lambda module: with_thresholds(module, {"first": -1.0}), "threshold of 'first'"),
    ],
)
def test_mistakes_are_told(call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call(seeded(Mlp))


def test_bad_data_is_told_and_hooks_go_away(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Mlp)
    before = noticed(module)
    with pytest.raises(DataError, match="no batch"):
        activation_sparsity(module, [])
    with pytest.raises(NonFiniteError, match="batch 1"):
        activation_sparsity(module, [MLP_DATA, MLP_DATA / 0])
    assert noticed(module) == before
    with torch.no_grad():
        module.get_parameter("first.weight").fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="batch 0: NaN or Inf at the output of module 'first'"):
        activation_sparsity(module, [normal(4, 12)])
