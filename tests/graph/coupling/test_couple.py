from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens import SPECIMENS, Specimen
from tersor.errors import ModelError
from tersor.graph import Place, couple
from tersor.graph.coupling import runs_of

CONSTRUCTS = {item.name: item for items in SPECIMENS.values() for item in items}


class Experts(nn.Module):
    """The sign of the input decides which layer of a list runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(3, 4) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.spare = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        number = int(x.sum() > 0)
        return self.down[number](self.up[number](x).relu())


def example(specimen: Specimen) -> Any:
    return [specimen.inputs(0), specimen.inputs(1)]


@pytest.mark.parametrize("name", ["resnet_a", "lstm", "encoder_post_norm", "cross_attention", "frozen", "tied_names"])
def test_the_model_is_left_as_it_was(name: str, noticed: Callable[[nn.Module], str]) -> None:
    model = CONSTRUCTS[name].model()
    next(model.children()).train()  # a mixture of modes
    fused, fast = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    before = noticed(model)
    couple(model, example(CONSTRUCTS[name]))
    assert noticed(model) == before
    assert (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()) == (fused, fast)
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was_when_it_does_not_run(noticed: Callable[[nn.Module], str]) -> None:
    model = CONSTRUCTS["encoder_post_norm"].model().train()
    before = noticed(model)
    with pytest.raises(ModelError):
        couple(model, torch.rand(2, 3))
    assert noticed(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_that_do_not_run_are_told_with_their_shapes() -> None:
    with pytest.raises(ModelError, match=r"Linear does not run on the example inputs \[\(2, 5\)\] : RuntimeError: .*"):
        couple(nn.Linear(3, 4), torch.rand(2, 5))
    with pytest.raises(ModelError, match=r"\[\] \{'input': \(2, 5\), 'much': 'int'\}"):
        couple(nn.Linear(3, 4), {"input": torch.rand(2, 5), "much": 1})


def test_experts_that_no_run_has_reached_follow_one_that_was() -> None:
    found = couple(Experts(), torch.ones(1, 3))
    (family,) = found.families
    assert {place.parameter for place in family.members} == {
        *(f"up.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
        *(f"down.{i}.weight" for i in range(3)),
    }
    assert all(torch.equal(rows, torch.arange(4)[:, None]) for rows in family.members.values())


def test_experts_that_runs_reach_one_by_one_are_free_of_each_other() -> None:
    found = couple(Experts(), [torch.ones(1, 3), -torch.ones(1, 3)])
    assert Place("up.1.weight", 0) not in found["up.0.weight[0]"].members
    assert Place("up.1.weight", 0) in found["up.1.weight[0]"].members


def test_unused_parameters_are_listed_and_frozen() -> None:
    found = couple(Experts(), torch.ones(1, 3))
    assert found.unused == ("spare.weight", "spare.bias")
    assert {item.name: item.reason for item in found.frozen}["spare.weight[0]"] == "no operator has read it"


def test_a_module_called_twice_is_one() -> None:
    layer = nn.Linear(4, 4)
    found = couple(nn.Sequential(nn.Linear(3, 4), layer, layer, nn.Linear(4, 2)), torch.ones(1, 3))
    (family,) = found.families
    assert {Place("1.weight", 0), Place("1.weight", 1), Place("3.weight", 1)} <= family.members.keys()


def test_tied_weights_are_one_place() -> None:
    model = CONSTRUCTS["nanogpt"].model()
    found = couple(model, example(CONSTRUCTS["nanogpt"]))
    assert not any(place.parameter == "lm_head.weight" for family in found.families for place in family.members)
    assert any(Place("wte.weight", 1) in family.members for family in found.families)


def test_a_coupling_prints_its_families_the_frozen_and_the_unused() -> None:
    text = str(couple(Experts(), torch.ones(1, 3)))
    first, second, *rest = text.splitlines()
    assert first == "1 families, 4 units"
    assert second.startswith("  up.0.weight[0]: 4 x channel -> up.0.bias[0], up.1.weight[0]")
    assert "  frozen down.0.weight[0]: it is an output of the model" in rest
    assert rest[-2:] == ["  unused spare.weight", "  unused spare.bias"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("lstm", {"hidden", "width"}),
        ("gru_bidirectional", {"hidden", "width"}),
        ("timm_vit", {"channel", "width"}),  # its heads are as wide as the stream
        ("cross_attention", {"head"}),
        ("resnet_b", {"channel"}),
    ],
)
def test_units_have_the_kinds_that_users_know(name: str, kinds: set[str]) -> None:
    found = couple(CONSTRUCTS[name].model(), example(CONSTRUCTS[name]))
    assert {family.kind for family in found.families} == kinds


def test_hidden_units_own_a_row_of_every_gate() -> None:
    model = nn.LSTM(3, 4)
    found = couple(nn.Sequential(model), torch.ones(2, 1, 3), prune_outputs=True)
    (family,) = [family for family in found.families if family.kind == "hidden"]
    assert family.members[Place("0.weight_ih_l0", 0)].tolist() == [[i, i + 4, i + 8, i + 12] for i in range(4)]
    assert family.members[Place("0.weight_hh_l0", 1)].tolist() == [[i] for i in range(4)]


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        (1, [((1,), {})]),
        ((1, 2), [((1, 2), {})]),
        ({"x": 1}, [((), {"x": 1})]),
        ([1, (2, 3), {"x": 4}], [((1,), {}), ((2, 3), {}), ((), {"x": 4})]),
    ],
)
def test_example_inputs_take_every_form(given: Any, runs: list[Any]) -> None:
    assert runs_of(given) == runs


def test_an_unknown_family_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        couple(nn.Linear(3, 4), torch.ones(1, 3))["nonsense"]


def test_a_model_without_parameters_has_no_families() -> None:
    found = couple(nn.ReLU(), torch.ones(2, 3))
    assert (found.families, found.frozen, found.unused) == ((), (), ())


def test_every_unit_owns_something_and_nothing_belongs_to_two() -> None:
    for name in ("resnext", "shufflenet_v2", "timm_vit", "grouped"):
        found = couple(CONSTRUCTS[name].model(), example(CONSTRUCTS[name]))
        owned: dict[Place, list[int]] = {}
        for family in found.families:
            assert all(rows.shape[0] == family.size for rows in family.members.values())
            for place, rows in family.members.items():
                owned.setdefault(place, []).extend(rows.flatten().tolist())
        assert owned
        assert all(len(set(indices)) == len(indices) for indices in owned.values())
