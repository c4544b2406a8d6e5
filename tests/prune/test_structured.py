from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens import SPECIMENS, Specimen
from tersor.errors import ConfigError, CoverageError, ModelError, NonFiniteError, UnsupportedError
from tersor.graph import apply_surgery
from tersor.probe import multiply_accumulates
from tersor.prune import PruneReport, choose_units, criteria, structured
from tersor.prune.structure import Structure

ZOO = {item.name: item for items in SPECIMENS.values() for item in items}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Three convolutions of 16, 32 and 24 channels, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


FAMILIES = {"0.weight[0]": 16, "3.weight[0]": 32, "5.weight[0]": 24}


def kept(report: PruneReport) -> dict[str, int]:
    return {cut.name: cut.kept for cut in report.families}


def prune(model: nn.Module | None = None, **settings: Any) -> PruneReport:
    return structured(net() if model is None else model, IMAGES, **settings)


def test_a_report_tells_what_was_done(noticed: Callable[[nn.Module], str]) -> None:
    model = net()
    before = noticed(model)
    report = prune(model, amount=0.5)
    assert noticed(model) == before
    assert kept(report) == {name: size // 2 for name, size in FAMILIES.items()}
    assert report.amount == 0.5
    assert report.params_before == sum(p.numel() for p in model.parameters())
    assert report.params_after == sum(p.numel() for p in report.model.parameters())
    assert report.macs_after == multiply_accumulates(report.model, (IMAGES,), {}) < report.macs_before
    assert set(report.seconds) == {"coupling", "scoring", "surgery", "verification"}
    text = str(report)
    assert f"parameters {report.params_before:,} -> {report.params_after:,} (" in text
    assert "verified, max relative error" in text
    assert "3.weight[0]: 32 -> 16 channels" in text
    assert "frozen 9.weight[0]: it is an output of the model" in text


def test_the_least_important_units_go() -> None:
    model = net()
    scores = model[3].weight.detach().square().sum((1, 2, 3)) + model[3].bias.detach().square()
    scores = scores + model[5].weight.detach().square().sum((0, 2, 3))
    report = prune(model, criterion="l2", allocation={"3.weight*": 0.25})
    gone = scores.argsort()[:8]
    assert set(report.surgery.kept()["3.weight", 0]) == set(range(32)) - set(gone.tolist())


def test_amount_zero_changes_nothing() -> None:
    report = prune(amount=0.0)
    assert (report.surgery.cuts, report.surgery.changes, report.amount) == ((), (), 0.0)
    assert torch.equal(report.model(IMAGES), net()(IMAGES))


def test_a_tiny_amount_takes_nothing_rather_than_too_much() -> None:
    assert kept(prune(amount=0.01)) == FAMILIES


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"floor": 0.0}, 1),
        ({"floor": 0.25}, 4),
        ({"allocation": "global", "floor": 0.0}, 1),
        ({"allocation": "global"}, 2),
    ],
)
def test_an_extreme_amount_leaves_every_layer_alive(settings: dict[str, Any], least: int) -> None:
    report = prune(amount=0.99, **settings)
    assert min(kept(report).values()) >= least
    assert bool(torch.isfinite(report.model(IMAGES)).all())


def test_a_global_ranking_does_not_empty_a_weak_layer() -> None:
    model = net()
    with torch.no_grad():
        for parameter in (model[3].weight, model[3].bias, model[5].weight):
            parameter.mul_(1e-4)
    report = prune(model, amount=0.5, allocation="global", normalise="none", floor=0.125)
    assert kept(report)["3.weight[0]"] == 4  # an eighth of 32
    assert kept(report)["0.weight[0]"] > 8


@pytest.mark.parametrize(
    ("step", "sizes"), [(8, (8, 16, 16)), (16, (16, 16, 16)), (5, (10, 15, 10)), (64, (8, 16, 12))]
)
def test_rounding_leaves_multiples_and_tells_the_effective_amount(step: int, sizes: tuple[int, ...]) -> None:
    report = prune(amount=0.5, round_to=step)
    assert tuple(kept(report).values()) == sizes
    assert report.amount == pytest.approx(1 - sum(sizes) / 72)
    assert f"units removed {report.amount:.1%}" in str(report)


def test_excluded_families_and_kinds_stay_whole_with_the_reason() -> None:
    report = prune(amount=0.5, exclude=("3.*",))
    assert kept(report) == {"0.weight[0]": 8, "5.weight[0]": 12}
    assert ("3.weight[0]", "excluded") in [tuple(item) for item in report.frozen]
    specimen = ZOO["lstm"]
    report = structured(specimen.model(), specimen.inputs(0), kinds=("hidden",))
    assert {cut.kind for cut in report.families} == {"hidden"}
    assert any(item.reason == "units of kind 'width' were not asked for" for item in report.frozen)


def test_amounts_by_family() -> None:
    report = prune(allocation={"3.weight*": 0.75, "5.*": 0.25})
    assert kept(report) == {"0.weight[0]": 16, "3.weight[0]": 8, "5.weight[0]": 18}


def test_erk_takes_about_the_amount() -> None:
    report = prune(allocation="erk", amount=0.5)
    assert report.amount == pytest.approx(0.5, abs=0.06)


def test_a_threshold_takes_what_scores_less() -> None:
    model = net()
    with torch.no_grad():
        for parameter in (model[3].weight[:5], model[3].bias[:5], model[5].weight[:, :5]):
            parameter.zero_()
    report = prune(model, threshold=1e-6, normalise="none")
    assert kept(report) == FAMILIES | {"3.weight[0]": 27}
    assert report.surgery.kept()["3.weight", 0] == tuple(range(5, 32))
    torch.testing.assert_close(report.model(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("goal", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_targets_are_met(goal: str, share: float) -> None:
    def size(model: nn.Module) -> int:
        if goal == "macs":
            return multiply_accumulates(model, (IMAGES,), {})
        tensors = list(model.parameters()) + (list(model.buffers()) if goal == "bytes" else [])
        return sum(tensor.numel() * (tensor.element_size() if goal == "bytes" else 1) for tensor in tensors)

    whole = size(net())
    by_share = prune(target={goal: share}, allocation="global")
    assert share - 0.08 < size(by_share.model) / whole <= share * 1.01
    by_number = prune(target={goal: share * whole}, allocation="global")
    assert by_number.surgery == by_share.surgery
    assert by_share.notes == []


def test_a_target_out_of_reach_returns_the_best_and_says_so() -> None:
    report = prune(target={"parameters": 0.01}, floor=0.5)
    assert report.amount == 0.5
    assert report.notes[0].startswith(f"target not met: parameters {report.params_after:,} is the least that floors")


def test_in_place_changes_the_model_itself() -> None:
    model, twin = net(), net()
    report = prune(model, inplace=True)
    assert report.model is model
    assert torch.equal(model(IMAGES), prune(twin).model(IMAGES))
    assert twin[0].out_channels == 16


@pytest.mark.parametrize("inplace", [False, True])
def test_the_result_is_in_the_mode_of_the_model(inplace: bool) -> None:
    model = net().train()
    model[1].eval()
    result = structured(model, IMAGES, amount=0.5, inplace=inplace).model
    assert [module.training for module in result] == [True, False, *[True] * 8]


def test_a_family_as_wide_as_the_step_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    report = structured(model, torch.ones(2, 4), amount=0.5, round_to=16)
    assert [(cut.units, cut.kept) for cut in report.families] == [(16, 16), (64, 32)]


def test_a_floor_is_a_minimum() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    report = structured(model, torch.ones(2, 4), amount=0.99, floor=0.1)
    assert report.families[0].kept == 4  # a tenth of 32 is 3.2


def test_a_training_mode_is_given_back_and_not_used() -> None:
    model = net().train()
    model[1].eval()
    report = prune(model)
    assert [module.training for module in model] == [True, False, *[True] * 8]
    assert report.surgery == prune().surgery


@pytest.mark.parametrize("criterion", ["l2", "random", "taylor"])
def test_the_same_seed_gives_the_same_bits(criterion: str) -> None:
    first, second = (prune(criterion=criterion, data=labelled(), loss=loss) for _ in range(2))
    assert first.surgery == second.surgery
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES[:4], torch.arange(4)), (IMAGES[4:], torch.arange(4))]


def loss(outputs: Any, labels: Tensor | None) -> Tensor:
    """Cross-entropy of whatever the model answers with."""
    assert labels is not None
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return functional.cross_entropy(logits.flatten(1)[:, :4], labels)


def data_for(specimen: Specimen) -> list[tuple[Tensor, Tensor]]:
    (inputs,) = specimen.inputs(0)
    return [(inputs, torch.arange(len(inputs)) % 4)]


REFUSED = {("apoz", "lstm"), ("batchnorm_scale", "lstm")}  # no activation before a layer, no norm


@pytest.mark.parametrize("name", ["resnet_b", "timm_vit", "lstm"])
@pytest.mark.parametrize("criterion", criteria.__all__)
def test_every_criterion_works_on_every_kind_of_unit_or_is_refused(criterion: str, name: str) -> None:
    specimen = ZOO[name]
    model = specimen.model()

    def run() -> PruneReport:
        return structured(
            model, specimen.inputs(0), amount=0.5, criterion=criterion, data=data_for(specimen), loss=loss,
            verify="together",
        )  # fmt: skip

    if (criterion, name) in REFUSED:
        with pytest.raises(
            UnsupportedError, match=f"criterion '{criterion}' says nothing about family .* choose another"
        ):
            run()
        return
    report = run()
    assert 0.3 < report.amount <= 0.5
    assert report.max_error is not None
    assert report.max_error <= 1e-4
    assert all(item.reason for item in report.frozen)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "wanda", "apoz", "obs", "obd", "movement"])
def test_a_measured_criterion_needs_data(criterion: str) -> None:
    with pytest.raises(ConfigError, match=rf"criterion '{criterion}' is measured on data \(.+\); pass data="):
        prune(criterion=criterion)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_a_criterion_from_gradients_needs_a_loss(criterion: str) -> None:
    with pytest.raises(ConfigError, match=rf"criterion '{criterion}' is taken from gradients; pass loss="):
        prune(criterion=criterion, data=labelled())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amount": 1.0}, "amount.*less than 1"),
        ({"amount": -0.1}, "amount.*greater than or equal to 0"),
        ({"amount": float("nan")}, "amount"),
        ({"amount": "half"}, "amount"),
        ({"criterion": "l3"}, "criterion: expected one of .*'l2'.*, got 'l3'"),
        ({"floor": 1.0}, "floor"),
        ({"round_to": 0}, "round_to"),
        ({"rounds": 0}, "rounds"),
        ({"kinds": ("wing",)}, "kinds"),
        ({"allocation": "fair"}, "allocation"),
        ({"allocation": {"3.*": 1.0}}, "allocation"),
        ({"target": {"time": 0.5}}, "target"),
        ({"target": {"macs": 0.0}}, "target"),
        ({"target": {}}, "expected one target"),
        ({"target": {"macs": 0.5, "bytes": 0.5}}, "expected one target"),
        ({"amount": 0.5, "threshold": 1.0}, "expected one of amount, target and threshold"),
        ({"amount": 0.5, "allocation": {"3.*": 0.5}}, "amounts by family leave no room for amount"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_settings_are_refused_up_front(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(**settings)


def test_everything_frozen_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        CoverageError, match=r"nothing of Linear can be pruned: weight\[0\]: it is an output.*weight\[1\]"
    ):
        structured(nn.Linear(3, 4), torch.rand(2, 3))
    with pytest.raises(CoverageError, match=r"0\.weight\[0\]: excluded"):
        prune(exclude=("*",))
    with pytest.raises(CoverageError, match="it has no parameters"):
        structured(nn.ReLU(), torch.rand(2, 3))


def test_inputs_that_do_not_run_are_told_with_their_shapes() -> None:
    with pytest.raises(ModelError, match=r"Sequential does not run on the example inputs \[\(2, 5, 4, 4\)\]"):
        structured(net(), torch.rand(2, 5, 4, 4))


def test_weights_that_are_not_numbers_are_told(noticed: Callable[[nn.Module], str]) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    before = noticed(model)
    with pytest.raises(NonFiniteError, match=r"3\.weight"):
        prune(model, inplace=True)
    assert noticed(model) == before


class Awkward(nn.Module):
    """A layer used twice, one that nobody uses, and a branch that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.unused = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x).relu()).relu()
        if float(x.sum()) > 1e9:
            x = x + 1
        return self.last(self.twice(x))


@pytest.mark.parametrize("training", [False, True])
def test_shared_modules_unused_parameters_and_branches_are_no_obstacle(training: bool) -> None:
    torch.manual_seed(0)
    model = Awkward().train(training)
    report = structured(model, torch.randn(3, 6), amount=0.5)
    assert report.unused == ("unused.weight", "unused.bias")
    assert report.model.unused.weight.shape == (5, 16)
    assert report.model.twice.weight.shape == (8, 8)
    assert "unused unused.weight" in str(report)


def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net with correlated channels, so that what stays can take over."""
    torch.manual_seed(0)
    x = torch.randn(512, 6) @ torch.randn(6, 20)
    y = torch.tanh(x @ torch.randn(20, 3))
    model = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def test_compensation_lowers_the_error_on_data_that_it_has_not_seen() -> None:
    model, x, _ = trained()
    seen, unseen = x[:384], x[384:]
    errors = []
    for compensate in (False, True):
        report = structured(model, seen[:4], amount=0.5, compensate=compensate, data=[seen])
        with torch.no_grad():
            errors.append(float(functional.mse_loss(report.model(unseen), model(unseen))))
        assert report.max_error is not None
        assert report.max_error <= 1e-4
    assert errors[1] < 0.5 * errors[0]
    assert report.notes == ["2 weights refitted by least squares"]


def test_compensation_needs_data_and_leaves_the_model(noticed: Callable[[nn.Module], str]) -> None:
    with pytest.raises(ConfigError, match="criterion 'l2' with compensation is measured on data"):
        prune(compensate=True)
    model = net()
    before = noticed(model)
    prune(model, compensate=True, data=labelled())
    assert noticed(model) == before


def test_batch_norm_statistics_are_taken_from_data_after_pruning() -> None:
    report = prune(data=labelled())
    assert "statistics of 1 BatchNorm layers re-estimated" in report.notes
    with torch.no_grad():
        means = torch.stack([report.model[0](images).mean((0, 2, 3)) for images, _ in labelled()]).mean(0)
    torch.testing.assert_close(report.model[1].running_mean, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("verify", ["full", "together", "off"])
def test_verification_can_be_less_or_none(verify: str) -> None:
    report = prune(verify=verify)
    assert report.surgery == prune().surgery
    assert (report.max_error is None) == (verify == "off")
    assert ("not verified" in str(report)) == (verify == "off")


@pytest.mark.parametrize("inplace", [False, True])
def test_rounds_remove_what_was_asked_and_give_one_surgery(inplace: bool) -> None:
    model, twin = net(), net()
    report = prune(model, amount=0.5, rounds=3, inplace=inplace)
    assert (report.model is model) == inplace
    assert report.amount == pytest.approx(0.5, abs=0.05)
    assert torch.equal(apply_surgery(twin, report.surgery)(IMAGES), report.model(IMAGES))


def test_settings_can_be_checked_without_a_model() -> None:
    assert Structure(amount=0.3).needs_evidence == frozenset()
    assert "gram" in Structure(compensate=True).needs_evidence


def test_a_pruned_model_can_be_trained_and_pruned_again() -> None:
    model = net()
    for _ in range(2):
        report = prune(model, amount=0.3)
        model = copy.deepcopy(report.model).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = [parameter.clone() for parameter in model.parameters()]
        loss(model(IMAGES[:4]), torch.arange(4)).backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert kept(report) == {"0.weight[0]": 8, "3.weight[0]": 15, "5.weight[0]": 12}


ORACLE = [
    "convolutional/resnet_a",
    "convolutional/resnext",
    "convolutional/mobilenet_v2",
    "convolutional/densenet",
    "branching/unet",
    "branching/shufflenet_v2",
    "plain/lstm",
    "constructs/tied_names",
    "constructs/pad_channels",
]


@pytest.mark.parametrize("name", ORACLE)
def test_zeros_put_in_by_hand_give_the_same_answers(name: str) -> None:
    """An oracle without labels or reference: nothing here takes a statistic over channels, so zeros are enough."""
    group, _, single = name.partition("/")
    specimen = next(item for item in SPECIMENS[group] if item.name == single)
    model = specimen.model()
    report = structured(model, specimen.inputs(0), amount=0.5, verify="off")
    assert report.surgery.cuts
    masked = copy.deepcopy(model)
    with torch.no_grad():
        parameters = dict(masked.named_parameters())
        for cut in report.surgery.cuts:
            if cut.parameter in parameters:
                gone = sorted(set(range(cut.size)) - set(cut.kept))
                parameters[cut.parameter].index_fill_(cut.dim, torch.tensor(gone), 0.0)
        for variant in (0, 1):
            expected, original = specimen.call(masked, variant), specimen.call(model, variant)
            torch.testing.assert_close(specimen.call(report.model, variant), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(expected, original, rtol=1e-3, atol=1e-4)


def test_no_example_is_refused() -> None:
    with pytest.raises(ModelError, match="empty list"):
        structured(net(), [])


def test_a_target_and_inputs_that_do_not_run_are_told_as_such() -> None:
    with pytest.raises(ModelError, match="does not run"):
        structured(net(), torch.zeros(2, 99), target={"macs": 0.5}, rounds=2)


def test_one_input_shape_only_is_told() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 3:
                raise ValueError("three rows only")
            return self.last(self.first(x).relu())

    report = structured(Fixed().eval(), torch.randn(3, 6))
    assert any("one input shape" in note for note in report.notes)


class Moody(nn.Module):
    """Looks at one of its weights: with large ones it takes another way, and fewer of them are larger on average."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.b.weight.abs().sum() / self.b.weight.numel() > 0.5:
            x = 2 * x
        return self.d(self.c(x).relu())


MOODY_INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def moody() -> Moody:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Moody().eval()
    with torch.no_grad():
        model.b.weight.mul_(5)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"verify": "together"},
        {"rounds": 2},
        {"target": {"parameters": 0.6}},
        {"allocation": {"a.*": 0.5, "b.*": 0.5, "c.*": 0.5}},
    ],
)
def test_what_only_the_real_weights_show_is_frozen_and_the_rest_goes(settings: dict[str, Any]) -> None:
    model = moody()
    report = structured(model, MOODY_INPUTS, **settings)
    reasons = {item.name: item.reason for item in report.frozen}
    start = "verification on the model's own weights: outputs differ from the masked model by "
    assert [name for name, reason in reasons.items() if reason.startswith(start)] == ["a.weight[0]", "b.weight[0]"]
    assert [(cut.name, cut.kept < cut.units) for cut in report.families] == [("c.weight[0]", True)]
    assert report.max_error is not None
    assert report.max_error < 1e-4
    assert report.model.get_parameter("b.weight").shape == (12, 12)
    with torch.no_grad():
        rows = list(report.surgery.kept()["c.weight", 0])
        hidden = model.c(2 * model.b(model.a(MOODY_INPUTS).relu()).relu())[:, rows].relu()
        expected = functional.linear(hidden, model.d.weight[:, rows], model.d.bias)
        torch.testing.assert_close(report.model(MOODY_INPUTS), expected)


def test_what_is_refitted_is_refitted_for_the_units_that_go_in_the_end() -> None:
    model, settings = moody(), {"compensate": True, "data": [MOODY_INPUTS]}
    report = structured(model, MOODY_INPUTS, **settings)
    assert [cut.name for cut in report.families] == ["a.weight[0]", "c.weight[0]"]  # refitted, `a` agrees
    assert report.notes == ["2 weights refitted by least squares"]
    alone = structured(model, MOODY_INPUTS, exclude=("b.*",), **settings)
    assert report.surgery == alone.surgery
    with torch.no_grad():
        assert torch.equal(report.model(MOODY_INPUTS), alone.model(MOODY_INPUTS))


@pytest.mark.parametrize("settings", [{"exclude": ("c.*",)}, {"allocation": {"b.*": 0.5, "a.*": 0.5}}])
def test_if_only_what_disagrees_was_asked_for_nothing_is_pruned(
    settings: dict[str, Any], noticed: Callable[[nn.Module], str]
) -> None:
    model = moody()
    before = noticed(model)
    with pytest.raises(CoverageError, match=r"b\.weight\[0\]: verification on the model's own weights: outputs differ"):
        structured(model, MOODY_INPUTS, inplace=True, **settings)
    assert noticed(model) == before


def test_a_later_round_that_finds_nothing_ends_the_rounds() -> None:
    model = moody()
    with torch.no_grad():
        model.b.weight.mul_(0.65)  # the first round does not get it over the threshold, the second does
    report = structured(model, MOODY_INPUTS, rounds=2, amount=0.5, exclude=("a.*", "c.*"))
    assert [(cut.units, 0 < cut.kept < 12) for cut in report.families] == [(12, True)]
    assert any(note.startswith("round 2 of 2 found nothing more to remove: ") for note in report.notes)


def test_units_are_chosen_without_cutting(noticed: Callable[[nn.Module], str]) -> None:
    model = net().train()
    before = noticed(model)
    chosen = choose_units(model, IMAGES, amount=0.5, exclude=("5.*",), rounds=3, compensate=True)
    assert noticed(model) == before
    report = structured(model, IMAGES, amount=0.5, exclude=("5.*",))
    kept = report.surgery.kept()
    assert chosen.families == tuple(cut.name for cut in report.families) == tuple(chosen.units)
    for name, units in chosen.units.items():
        place = next(iter(chosen.coupling[name].members))
        assert sorted({*units.tolist(), *kept[place.parameter, place.dim]}) == list(range(chosen.coupling[name].size))
    assert ("5.weight[0]", "excluded") in chosen.frozen
    with pytest.raises(ConfigError, match="pass data="):
        choose_units(model, IMAGES, criterion="taylor")
