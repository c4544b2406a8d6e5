from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens import SPECIMENS, Specimen, transformers_specimens
from tersor.core.surgery import Change, Cut, Surgery
from tersor.errors import ConfigError, SurgeryError
from tersor.graph import apply_surgery, couple, plan_surgery

ZOO = {item.name: item for items in SPECIMENS.values() for item in items}


class Small(nn.Module):
    """Convolution, BatchNorm, and linear layers whose heads are counted by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes = 3, [6, 8]
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.wide, self.out = nn.Linear(8, 6), nn.Linear(6, 2)
        self.register_buffer("factor", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3)) * self.factor
        return self.out(self.wide(x).view(len(x), self.heads, -1).softmax(-1).flatten(1))


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
HEADS, CHANNELS = "wide.weight[0]", "conv.weight[0]"


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def plan(model: nn.Module, **removed: list[int]) -> Surgery:
    names = {"heads": HEADS, "channels": CHANNELS}
    chosen = {names[name]: torch.tensor(units) for name, units in removed.items()}
    return plan_surgery(model, couple(model, IMAGES), chosen)


@pytest.fixture
def surgery() -> Surgery:
    return plan(small(), heads=[1], channels=[0, 5])


def test_parameters_and_buffers_are_sliced(surgery: Surgery) -> None:
    before, model = small(), apply_surgery(small(), surgery)
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(model.conv.weight, before.conv.weight[kept])
    assert torch.equal(model.norm.running_var, before.norm.running_var[kept])
    assert torch.equal(model.factor, before.factor[kept])
    assert torch.equal(model.wide.weight, before.wide.weight[[0, 1, 4, 5]][:, kept])
    assert model.state_dict().keys() == before.state_dict().keys()
    assert model(IMAGES).shape == (2, 2)


def test_attributes_follow(surgery: Surgery) -> None:
    model = apply_surgery(small(), surgery)
    assert (model.heads, model.sizes) == (2, [6, 8])  # the list was read by nobody
    assert (model.conv.out_channels, model.norm.num_features) == (6, 6)
    assert (model.wide.in_features, model.wide.out_features, model.out.in_features) == (6, 4, 4)


def test_a_surgery_survives_json(surgery: Surgery) -> None:
    again = Surgery.from_json(surgery.to_json())
    assert again == surgery
    assert torch.equal(apply_surgery(small(), again)(IMAGES), apply_surgery(small(), surgery)(IMAGES))
    assert surgery.kept()["conv.weight", 0] == (1, 2, 3, 4, 6, 7)


@pytest.mark.parametrize("text", ["", "[]", '{"cuts": [{"parameter": "a"}]}', '{"cats": []}', '{"version": "1"}'])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="surgery"):
        Surgery.from_json(text)


def test_planning_changes_nothing(noticed: Callable[[nn.Module], str]) -> None:
    model = small()
    before = noticed(model)
    plan(model, heads=[1])
    assert noticed(model) == before


def test_nothing_removed_is_an_empty_surgery(noticed: Callable[[nn.Module], str]) -> None:
    model = small()
    empty = plan(model, heads=[])
    assert empty == Surgery()
    before = noticed(model)
    assert apply_surgery(model, empty) is model
    assert noticed(model) == before


def test_one_unit_must_stay() -> None:
    with pytest.raises(SurgeryError, match=r"family 'wide.weight\[0\]' has 3 units, at least one must stay"):
        plan(small(), heads=[0, 1, 2])


def changed(surgery: Surgery, number: int = 0, **update: Any) -> Surgery:
    cuts = list(surgery.cuts)
    cuts[number] = cuts[number].model_copy(update=update)
    return surgery.model_copy(update={"cuts": tuple(cuts)})


def with_change(surgery: Surgery, **update: Any) -> Surgery:
    change = Change(owner="", name="heads", before=3, after=2).model_copy(update=update)
    return surgery.model_copy(update={"changes": (change,)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: changed(s, size=9), r"dimension 0 of 'conv.weight' must have size 9, its shape is \(8, 3, 1, 1\)"),
        (lambda s: changed(s, dim=7), "dimension 7 of 'conv.weight' must have size 8"),
        (lambda s: changed(s, parameter="nonsense"), "the surgery cuts 'nonsense', the model has no such parameter"),
        (lambda s: changed(s, kept=(1, 8)), "what is kept of 'conv.weight' must be ascending indices below 8"),
        (lambda s: changed(s, kept=(2, 1)), "ascending"),
        (lambda s: changed(s, kept=(1, 1)), "ascending"),
        (lambda s: changed(s, kept=(-1, 1)), "ascending"),
        (lambda s: changed(s, kept=()), "what is kept"),
        (lambda s: with_change(s, before=4), "attribute heads must be 4, it is 3"),
        (lambda s: with_change(s, name="legs"), "the surgery changes legs, the model has no such attribute"),
        (lambda s: with_change(s, owner="nose"), r"the surgery changes nose\.heads"),
        (lambda s: with_change(s, name="sizes", position=5), r"the surgery changes sizes\[5\]"),
        (lambda s: with_change(s, position=0), r"the surgery changes heads\[0\]"),
        (lambda s: s.model_copy(update={"freed": ("nose",)}), "the surgery expects a module 'nose'"),
        (lambda s: s.model_copy(update={"freed": ("conv",)}), "'conv' must be nn.MultiheadAttention, it is Conv2d"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    damage: Callable[[Surgery], Surgery], message: str, surgery: Surgery, noticed: Callable[[nn.Module], str]
) -> None:
    model = small()
    before, heads = noticed(model), model.heads
    with pytest.raises(SurgeryError, match=message):
        apply_surgery(model, damage(surgery))
    assert noticed(model) == before
    assert model.heads == heads


def test_a_second_application_is_refused(surgery: Surgery, noticed: Callable[[nn.Module], str]) -> None:
    model = apply_surgery(small(), surgery)
    before = noticed(model)
    with pytest.raises(SurgeryError, match="a surgery fits only the model that it was made for, as it was before"):
        apply_surgery(model, surgery)
    assert noticed(model) == before


def test_frozen_layers_stay_frozen_and_results_stand_by_themselves(surgery: Surgery) -> None:
    original = small()
    original.conv.requires_grad_(False)
    model = apply_surgery(copy.deepcopy(original), surgery)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in original.parameters()]
    assert all(p.is_leaf and p.is_contiguous() and p._base is None for p in model.parameters())


def test_one_attention_module_is_freed_only_where_it_is_cut() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(12, 3, 8, batch_first=True) for _ in range(2)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 4, 12)
    coupling = couple(model, x)
    family = next(item for item in coupling.families if item.name.startswith("1.self_attn"))
    surgery = plan_surgery(model, coupling, {family.name: torch.tensor([2])})
    assert surgery.freed == ("1.self_attn",)
    pruned = apply_surgery(model, surgery)
    assert type(pruned[0].self_attn) is nn.MultiheadAttention
    assert pruned[1].self_attn.num_heads == 2
    assert pruned(x).shape == x.shape


def half_of_everything(specimen: Specimen, model: nn.Module) -> Surgery:
    coupling = couple(model, [specimen.inputs(0), specimen.inputs(1)])
    return plan_surgery(model, coupling, {f.name: torch.arange(f.size // 2) for f in coupling.families})


@pytest.mark.parametrize("name", ["nanogpt", "tied_names"])
def test_tied_weights_remain_one_object(name: str) -> None:
    model = ZOO[name].model()
    before = [
        [key for key, other in model.state_dict(keep_vars=True).items() if other is one] for one in model.parameters()
    ]
    assert any(len(names) > 1 for names in before)
    apply_surgery(model, half_of_everything(ZOO[name], model))
    after = [
        [key for key, other in model.state_dict(keep_vars=True).items() if other is one] for one in model.parameters()
    ]
    assert sorted(after) == sorted(before)


def test_recurrent_layers_run_without_a_warning_and_know_their_sizes() -> None:
    model = ZOO["lstm"].model()
    apply_surgery(model, half_of_everything(ZOO["lstm"], model))
    assert model.lstm.hidden_size == model.lstm.weight_hh_l0.shape[1] == 24
    assert model.lstm.input_size == model.lstm.weight_ih_l0.shape[1] == 12
    assert ZOO["lstm"].call(model.train()).shape == ZOO["lstm"].call(ZOO["lstm"].model()).shape


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the library transformers")
@pytest.mark.parametrize("name", ["qwen2", "gpt2_sdpa"])
def test_cached_decoding_works_with_fewer_heads(name: str) -> None:
    specimen = next(item for item in transformers_specimens() if item.name == name)
    model = specimen.model()
    apply_surgery(model, half_of_everything(specimen, model))
    tokens = specimen.inputs(0)["input_ids"]
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    with torch.no_grad():
        whole = model(tokens).logits
        start = model(tokens[:, :4], use_cache=True)
        rest = model(tokens[:, 4:], **{named: getattr(start, named)}, use_cache=True)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_fields_of_a_configuration_are_written_once_for_all_that_share_it() -> None:
    class HeadConfig:
        def __init__(self) -> None:
            self.heads = 3

    class Reader(nn.Module):
        def __init__(self, config: HeadConfig) -> None:
            super().__init__()
            self.config = config
            self.wide, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.wide(x).view(len(x), self.config.heads, -1).softmax(-1).flatten(1))

    config = HeadConfig()
    model = nn.Sequential(Reader(config), Reader(config)).eval()
    x = torch.randn(2, 4)
    coupling = couple(model, x)
    (family,) = [family for family in coupling.families if family.kind == "head" or "wide" in family.name]
    assert family.size == 3  # one number for both readers: they lose the same heads
    surgery = plan_surgery(model, coupling, {family.name: torch.tensor([0])})
    assert [str(change.owner) + "." + change.name for change in surgery.changes].count("0.config.heads") == 1
    apply_surgery(model, surgery)
    assert config.heads == 2
    assert model(x).shape == (2, 4)


def test_cuts_are_checked_when_they_are_made() -> None:
    with pytest.raises(ConfigError, match="dim"):
        Cut(parameter="a", dim=-1, size=2, kept=(0,))
    with pytest.raises(ConfigError, match="size"):
        Cut(parameter="a", dim=0, size=0, kept=())


def test_two_surgeries_become_one(surgery: Surgery) -> None:
    step = apply_surgery(small(), surgery)
    later = plan(step, heads=[0], channels=[1, 2])
    both = Surgery.from_json(surgery.then(later).to_json())
    assert torch.equal(apply_surgery(small(), both)(IMAGES), apply_surgery(step, later)(IMAGES))


def test_the_order_in_memory_stays() -> None:
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last).eval()
    )
    images = torch.randn(2, 3, 8, 8)
    coupling = couple(model, images)
    surgery = plan_surgery(model, coupling, {"0.weight[0]": torch.tensor([1, 2])})
    pruned = apply_surgery(copy.deepcopy(model), surgery)
    for index in (0, 2):
        weight = pruned.get_parameter(f"{index}.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    plain = apply_surgery(copy.deepcopy(model).to(memory_format=torch.contiguous_format), surgery)
    assert plain.get_parameter("0.weight").is_contiguous()
    torch.testing.assert_close(pruned(images), plain(images))
