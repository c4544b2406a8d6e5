"""A wrong surgery must not pass: what the numerical proof sees, and what is done about it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specimens import SPECIMENS
from specimens.base import images
from tersor.core.surgery import Cut, Surgery
from tersor.errors import CoverageError
from tersor.graph import Verifier, apply_surgery, compare, couple, plan_surgery
from tersor.graph.coupling import runs_of
from tersor.graph.coupling.couple import run_model
from tersor.graph.coupling.rules.pointwise import pointwise
from tersor.graph.coupling.trace import Call, Trace
from tersor.graph.reference import masked_outputs
from tersor.graph.verify import TOLERANCE, VISIBLE, distance, other_shapes, randomised
from tersor.prune import structured

ZOO = {item.name: item for items in SPECIMENS.values() for item in items}


@cache
def verifier(name: str) -> Verifier:
    specimen = ZOO[name]
    model = specimen.model()
    given = [specimen.inputs(0), specimen.inputs(1)]
    return Verifier(model, couple(model, given), runs_of(given))


@cache
def planned(name: str) -> tuple[Mapping[str, Tensor], Surgery, list[Any]]:
    """What goes, the surgery, and what the masked model answers."""
    proof = verifier(name)
    removed = proof.half([family.name for family in proof.coupling.families])
    surgery = plan_surgery(proof.model, proof.coupling, removed)
    return removed, surgery, masked_outputs(proof.model, proof.coupling, removed, proof.runs)


def error_of(name: str, surgery: Surgery) -> float:
    proof, (_, _, wanted) = verifier(name), planned(name)
    pruned = apply_surgery(copy.deepcopy(proof.model), surgery)
    with torch.no_grad():
        answers = [run_model(pruned, args, kwargs) for args, kwargs in proof.runs]
    return max(distance(answer, want) for answer, want in zip(answers, wanted, strict=True))


def damaged(cut: Cut) -> Cut:
    """One index that stays is another one."""
    gone = sorted(set(range(cut.size)) - set(cut.kept))
    kept = list(cut.kept)
    kept[len(kept) // 2] = gone[len(gone) // 2]
    return cut.model_copy(update={"kept": tuple(sorted(kept))})


CONTROLS = ["resnet_a", "resnet_b", "mobilenet_v3", "timm_vit", "different_heads", "lstm"]


@pytest.mark.parametrize("name", CONTROLS)
def test_one_wrong_index_in_any_cut_is_seen(name: str) -> None:
    _, surgery, _ = planned(name)
    assert error_of(name, surgery) <= TOLERANCE
    missed = []
    for number, cut in enumerate(surgery.cuts):
        if cut.parameter.endswith(".k.bias"):
            continue  # softmax does not see it; see below
        cuts = [*surgery.cuts[:number], damaged(cut), *surgery.cuts[number + 1 :]]
        if error_of(name, surgery.model_copy(update={"cuts": tuple(cuts)})) <= TOLERANCE:
            missed.append(cut.parameter)
    assert missed == []


def test_wrong_biases_of_keys_are_the_only_benign_ones() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 3
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, runs = Keys().eval(), runs_of(torch.randn(2, 5, 12))
    proof = Verifier(model, couple(model, torch.randn(2, 5, 12)), runs)
    removed = proof.half([family.name for family in proof.coupling.families])
    surgery = plan_surgery(proof.model, proof.coupling, removed)
    wanted = masked_outputs(proof.model, proof.coupling, removed, proof.runs)
    benign = []
    for number, cut in enumerate(surgery.cuts):
        cuts = [*surgery.cuts[:number], damaged(cut), *surgery.cuts[number + 1 :]]
        pruned = apply_surgery(copy.deepcopy(proof.model), surgery.model_copy(update={"cuts": tuple(cuts)}))
        with torch.no_grad():
            answers = [run_model(pruned, args, kwargs) for args, kwargs in proof.runs]
        if max(distance(a, b) for a, b in zip(answers, wanted, strict=True)) <= TOLERANCE:
            benign.append(cut.parameter)
    assert benign == ["k.bias"]


class Hidden(nn.Module):
    """A residual branch that its own scale, or a BatchNorm that starts at zero, hides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6 if how == "layer scale" else 1.0))
        if how == "zero BatchNorm":
            nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.norm(self.outer(self.inner(x).relu()))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["layer scale", "zero BatchNorm"])
def test_what_default_weights_hide_is_verified_all_the_same(how: str) -> None:
    torch.manual_seed(0)
    model = Hidden(how).eval()
    example = images(8, 8)(0)
    coupling = couple(model, example)
    name = "inner.weight[0]"
    proof = Verifier(model, coupling, runs_of(example))
    removed = proof.half([name])
    with torch.no_grad():
        answers = [run_model(model, args, kwargs) for args, kwargs in proof.runs]
    assert compare(model, coupling, removed, proof.runs, expected=answers).effect < VISIBLE
    verdict = proof.check(removed)
    assert verdict.ok
    assert verdict.effect > 1e-3
    assert name in proof.settle([family.name for family in coupling.families])[0]


def test_a_randomised_copy_has_visible_normalised_signals_and_leaves_the_model(
    noticed: Callable[[nn.Module], str],
) -> None:
    model = ZOO["resnet_a"].model().train()
    before = noticed(model)
    copied = randomised(model, runs_of(ZOO["resnet_a"].inputs(0)), seed=0)
    assert noticed(model) == before
    assert not copied.training
    norms = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(module.momentum == 0.1 for module in norms)
    with torch.no_grad():
        out = ZOO["resnet_a"].call(copied)
    assert 1e-2 < float(out.std()) < 1e2


def test_the_same_seed_verifies_with_the_same_weights() -> None:
    runs = runs_of(ZOO["resnet_a"].inputs(0))
    first, second, other = (randomised(ZOO["resnet_a"].model(), runs, seed) for seed in (0, 0, 1))
    assert torch.equal(ZOO["resnet_a"].call(first), ZOO["resnet_a"].call(second))
    assert not torch.equal(ZOO["resnet_a"].call(first), ZOO["resnet_a"].call(other))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet_a", [(3, 3, 32, 32), (2, 3, 16, 32)]),
        ("timm_vit", [(3, 3, 32, 32)]),  # positions belong to one image size
        ("nanogpt", [(3, 9), (2, 8)]),
    ],
)
def test_other_shapes_are_tried_where_the_model_takes_them(name: str, shapes: list[tuple[int, ...]]) -> None:
    runs = other_shapes(ZOO[name].model(), runs_of(ZOO[name].inputs(0))[0])
    assert [tuple(args[0].shape) for args, _ in runs] == shapes


class Branches(nn.Module):
    """Two layers before a ReLU, each in a family of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x).relu())))


def forgetful(trace: Trace, call: Call) -> None:
    """A rule that lies: the columns of what follows belong to the channels in reverse order."""
    trace.put(call.out, tuple(block.flip(-1) for block in trace.blocks(call.args[0])))


BRANCHES = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def branches() -> Branches:
    torch.manual_seed(0)
    return Branches().eval()


def test_a_rule_that_lies_freezes_what_it_spoils_and_nothing_else() -> None:
    report = structured(branches(), BRANCHES, amount=0.5, rules={"aten.relu": forgetful})
    reasons = {item.name: item.reason for item in report.frozen}
    assert reasons["a.weight[0]"].startswith("verification: outputs differ from the masked model by ")
    assert [cut.name for cut in report.families] == ["b.weight[0]"]
    assert report.max_error is not None
    assert report.max_error <= TOLERANCE


def test_if_every_rule_lies_nothing_is_pruned(noticed: Callable[[nn.Module], str]) -> None:
    model = branches()
    before = noticed(model)
    with pytest.raises(CoverageError, match=r"a\.weight\[0\]: verification: .*b\.weight\[0\]: verification: "):
        structured(model, BRANCHES, rules={"aten.relu": forgetful, "aten.tanh": forgetful}, inplace=True)
    assert noticed(model) == before


class Interleaved(nn.Module):
    """Two factors: if as many units of each go, sizes agree by luck."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.left(x).relu() * self.right(x).sigmoid())


def untied(trace: Trace, call: Call) -> None:
    """A rule that lies: the two factors of a product have nothing to do with each other."""
    trace.put(call.out, trace.blocks(call.args[0]))


def test_families_alone_catch_what_all_together_miss() -> None:
    torch.manual_seed(0)
    model = Interleaved().eval()
    coupling = couple(model, BRANCHES, rules={"aten.mul": untied})
    names = [family.name for family in coupling.families]
    assert names == ["left.weight[0]", "right.weight[0]"]  # wrong: they are one
    proof = Verifier(model, coupling, runs_of(BRANCHES), rules={"aten.mul": untied})
    same = {name: torch.arange(4) for name in names}
    assert proof.check(same).ok  # by luck, the same positions
    sound, frozen, _ = proof.settle(names)
    assert sound == []
    assert [item.name for item in frozen] == names
    assert all(item.reason.startswith("verification: the pruned model fails: ") for item in frozen)


def test_what_no_input_shows_is_frozen() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + 0.0 * self.b(self.a(x))

    torch.manual_seed(0)
    model = Dead().eval()
    proof = Verifier(model, couple(model, BRANCHES), runs_of(BRANCHES))
    sound, frozen, _ = proof.settle(["a.weight[0]"])
    assert sound == []
    assert frozen[0].reason == "verification: removing it has no visible effect to verify"


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 0.5),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), float("inf")),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), float("inf")),
        (torch.tensor([float("-inf"), 1.0]), torch.tensor([float("-inf"), 1.0]), 0.0),
        ({"x": torch.ones(2)}, {"x": torch.ones(2)}, 0.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 0.0),  # integers: what they stand for may have moved
    ],
)
def test_distance_is_relative_to_the_largest_output(left: Any, right: Any, expected: float) -> None:
    assert distance(left, right) == expected


def test_masked_statistics_run_over_what_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).eval()
    coupling = couple(model, BRANCHES)
    (family,) = coupling.families
    (out,) = masked_outputs(model, coupling, {family.name: torch.tensor([1, 4])}, runs_of(BRANCHES))
    kept = [0, 2, 3, 5]
    with torch.no_grad():
        hidden = model[0](BRANCHES)[:, kept]
        normed = nn.functional.layer_norm(hidden, [4], model[1].weight[kept], model[1].bias[kept])
        wanted = nn.functional.linear(normed, model[2].weight[:, kept], model[2].bias)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_without_norms_masked_means_zeroed() -> None:
    model = branches()
    coupling = couple(model, BRANCHES, rules={"aten.tanh": pointwise})
    (out,) = masked_outputs(model, coupling, {"a.weight[0]": torch.tensor([1, 4])}, runs_of(BRANCHES))
    with torch.no_grad():
        for parameter in (model.a.weight, model.a.bias):
            parameter[[1, 4]] = 0.0
        assert torch.equal(out, model(BRANCHES))


@pytest.mark.parametrize("size", range(2, 40))
def test_a_half_is_odd_so_that_no_swap_of_pairs_maps_it_to_itself(size: int) -> None:
    model = nn.Sequential(nn.Linear(5, size), nn.Linear(size, 2)).eval()
    proof = Verifier(model, couple(model, BRANCHES), runs_of(BRANCHES))
    for attempt in range(3):
        units = proof.half(["0.weight[0]"], attempt)["0.weight[0]"]
        assert len(set(units.tolist())) == len(units) < size
        assert len(units) % 2 == 1
