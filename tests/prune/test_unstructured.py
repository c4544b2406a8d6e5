from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.candidate import Candidate
from tersor.distill import Recover
from tersor.errors import ConfigError, DataError, UnsupportedError
from tersor.graph import lower
from tersor.prune import Sparsity, SparsityReport, Unstructured, unstructured
from tersor.prune.patterns import as_matrix
from tersor.prune.selection import select
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Cnn,
    Depthwise,
    Mlp,
    Transformer,
    context_for,
    integers,
    normal,
    seeded,
    state_hash,
)

RANKED = 12 * 16 + 16 * 16 + 16 * 4  # weights of the Mlp


def unstructured_masks(module: nn.Module, amount: float, **rest: Any) -> dict[str, Tensor]:
    masks = rest.pop("masks", None)
    return select(module, Sparsity(amount=amount, **rest), masks=masks).masks


def zeros(masks: Mapping[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("sparsity", [0.0, 1 / RANKED, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.97])
def test_the_share_of_zeros_is_exact_and_the_smallest_weights_go(sparsity: float) -> None:
    module = seeded(Mlp)
    before = state_hash(module)
    masks = unstructured_masks(module, sparsity, floor=0.0)
    assert set(masks) == {"first.weight", "second.weight", "last.weight"}
    assert zeros(masks) == round(sparsity * RANKED)
    assert state_hash(module) == before
    kept = torch.cat([module.get_parameter(path)[mask].abs() for path, mask in masks.items()])
    gone = torch.cat([module.get_parameter(path)[~mask].abs() for path, mask in masks.items()])
    if 0 < sparsity <= 0.9:  # beyond, the one weight that every layer keeps may be smaller than others' lost ones
        assert gone.max() <= kept.min()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    sparsity=st.floats(0, 0.99),
    floor=st.floats(0, 0.5),
    seed=st.integers(0, 100),
)
def test_every_layer_keeps_its_floor_and_the_total_is_exact_where_floors_allow(
    sizes: list[tuple[int, int]], sparsity: float, floor: float, seed: int
) -> None:
    weights = {f"w{index}": normal(*size, seed=seed) * 10**index for index, size in enumerate(sizes)}
    module = nn.ParameterDict(weights)
    masks = unstructured_masks(module, sparsity, floor=floor)
    total, room = 0, 0
    for name, weight in weights.items():
        least = max(1, math.ceil(floor * weight.numel() - 1e-9))
        assert int(masks[name].sum()) >= least
        assert bool(masks[name].flatten()[weight.abs().argmax()])
        total, room = total + weight.numel(), room + weight.numel() - least
    assert zeros(masks) == min(round(sparsity * total), room)


def test_a_layer_of_tiny_weights_does_not_die() -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter("second.weight").mul_(1e-6)
    masks = unstructured_masks(module, 0.7, floor=0.1)
    assert int(masks["second.weight"].sum()) == round(0.1 * 256)
    assert zeros(masks) == round(0.7 * RANKED)


def test_weights_of_one_dimension_stay_and_tied_ones_count_once() -> None:
    masks = unstructured_masks(seeded(Transformer), 0.5)
    parameters = dict(seeded(Transformer).named_parameters())
    assert set(masks) == {path for path, parameter in parameters.items() if parameter.ndim >= 2}
    assert ("embedding.weight" in masks) != ("head.weight" in masks)
    assert zeros(masks) == round(0.5 * sum(mask.numel() for mask in masks.values()))


@pytest.mark.parametrize(
    ("first", "then", "floor"), [(0.3, 0.6, 0.01), (0.8, 0.3, 0.01), (0.8, 0.8, 0.0), (0.8, 0.9, 0.5)]
)
def test_what_an_earlier_round_removed_stays_removed(first: float, then: float, floor: float) -> None:
    module = seeded(Mlp)
    earlier = unstructured_masks(module, first)
    later = unstructured_masks(module, then, floor=floor, masks=earlier)
    assert not any(bool((later[path] & ~earlier[path]).any()) for path in earlier)
    if floor < 0.5:
        assert zeros(later) == round(max(first, then) * RANKED)
    else:
        assert zeros(later) == zeros(earlier)  # every layer has less than its floor already


def test_the_floor_protects_what_is_left_not_what_is_gone() -> None:
    module = nn.ParameterDict({"large": normal(10, 10), "small": 1e-6 * normal(10, 10, seed=1)})
    earlier = {path: weight.abs() < weight.abs().median() for path, weight in module.items()}  # the largest are gone
    later = unstructured_masks(module, 0.74, floor=0.25, masks=earlier)
    assert int(later["small"].sum()) == 25
    assert not any(bool((later[path] & ~earlier[path]).any()) for path in earlier)
    assert zeros(later) == 148


def test_the_step_zeroes_a_copy_and_says_so(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Mlp)
    before = noticed(module)
    candidate = Candidate(module)
    done = Unstructured(sparsity=0.5).apply(candidate, context_for(module, MLP_DATA))
    assert noticed(module) == before
    assert candidate.masks == {}
    assert zeros(done.masks) == RANKED // 2
    for path, mask in done.masks.items():
        assert torch.equal(done.module.get_parameter(path), module.get_parameter(path) * mask)
    for path in ("first.bias", "second.bias", "last.bias"):
        assert torch.equal(done.module.get_parameter(path), module.get_parameter(path))
    assert done.history[-1].name == "prune.unstructured"
    assert done.history[-1].notes[0] == f"{RANKED // 2:,} of {RANKED:,} weights (50.0%) are zero"


def test_a_second_step_prunes_further() -> None:
    module = seeded(Mlp)
    context = context_for(module, MLP_DATA)
    once = Unstructured(sparsity=0.5).apply(Candidate(module), context)
    twice = Unstructured(sparsity=0.75).apply(once, context)
    assert zeros(twice.masks) == round(0.75 * RANKED)
    assert all(not bool((twice.masks[path] & ~mask).any()) for path, mask in once.masks.items())


def test_masks_hold_through_recovery_and_a_state_dict() -> None:
    module = seeded(Cnn)
    context = context_for(module, None, train=(CNN_DATA, integers(5, 48)))
    pruned = Unstructured(sparsity=0.6).apply(Candidate(module), context)
    schedule = Schedule(epochs=3, batch_size=16, lr=0.1, weight_decay=0.1)
    done = Recover(schedule=schedule).apply(pruned, context)
    assert state_hash(done.module) != state_hash(pruned.module)
    stream = io.BytesIO()
    torch.save(done.module.state_dict(), stream)
    stream.seek(0)
    loaded = Cnn()
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for path, mask in pruned.masks.items():
        assert torch.equal(done.masks[path], mask)
        weight = loaded.get_parameter(path)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
        assert not torch.equal(weight, pruned.module.get_parameter(path))


@pytest.mark.parametrize("case", ["cnn", "transformer"])
def test_zeros_stay_zeros_through_int8(case: str) -> None:
    if case == "cnn":
        module, context = seeded(Cnn), context_for(seeded(Cnn), CNN_DATA)
    else:
        module = seeded(Transformer)
        context = context_for(module, TEXT_DATA, None, output="logits")
        context = type(context)(
            context.task, context.target.model_copy(update={"dynamic": TEXT_DYNAMIC}), context.original
        )
    pruned = Unstructured(sparsity=0.5).apply(Candidate(module), context)
    done = Static().apply(pruned, context)
    assert done.simulation is not None
    constants = lower(done.simulation).constants
    checked = 0
    for path, mask in pruned.masks.items():
        if path in constants:
            assert (constants[path].codes[~mask] == 0).all()
            assert float((constants[path].codes[mask] != 0).double().mean()) > 0.9
            checked += 1
        fresh = done.for_weights().module.get_parameter(path)
        assert (fresh[~mask] == 0).all()
    assert checked >= 3


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_an_impossible_sparsity_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match=r"Sparsity\.amount"):
        unstructured(seeded(Mlp), sparsity)
    with pytest.raises(ConfigError, match=r"Unstructured\.sparsity"):
        Unstructured(sparsity=sparsity)


def test_an_impossible_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor"):
        unstructured_masks(seeded(Mlp), 0.5, floor=1.0)


def test_an_unknown_criterion_is_refused_naming_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Sparsity\.criterion.*'l1'.*'wanda'.*'magnitude'"):
        unstructured(seeded(Mlp), 0.5, criterion="magnitude")
    with pytest.raises(ConfigError, match=r"Unstructured\.criterion.*'l1'.*'wanda'.*'magnitude'"):
        Unstructured(sparsity=0.5, criterion="magnitude")


@pytest.mark.parametrize("criterion", ["fpgm", "batchnorm_scale", "apoz", "order"])
def test_a_criterion_of_whole_channels_is_refused(criterion: str) -> None:
    with pytest.raises(ConfigError, match=f"{criterion}' judges whole channels; .*'l1'"):
        unstructured(seeded(Mlp), 0.5, criterion=criterion)


def test_a_model_without_weights_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="BatchNorm1d has no parameter"):
        unstructured_masks(nn.BatchNorm1d(3), 0.5)


def mean_loss(outputs: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return nn.functional.cross_entropy(outputs, labels)


BATCHES = [(CNN_DATA[:24], integers(5, 24)), (CNN_DATA[24:], integers(5, 24, seed=1))]
ENTRIES = ["fisher", "l1", "l2", "lamp", "movement", "obd", "obs", "random", "taylor", "wanda"]


@pytest.mark.parametrize("criterion", ENTRIES)
def test_every_criterion_of_entries_prunes_exactly_and_twice_alike(
    criterion: str, noticed: Callable[[nn.Module], str]
) -> None:
    module = seeded(Cnn)
    before = noticed(module)
    report, again = (
        unstructured(module, 0.6, criterion=criterion, data=BATCHES, loss=mean_loss, floor=0.05) for _ in range(2)
    )
    assert noticed(module) == before
    assert report.skipped == []
    total = sum(mask.numel() for mask in report.masks.values())
    assert zeros(report.masks) == round(0.6 * total)
    assert report.sparsity == pytest.approx(0.6, abs=1 / total)
    assert state_hash(report.model) == state_hash(again.model)
    for path, mask in report.masks.items():
        assert torch.equal(report.model.get_parameter(path), module.get_parameter(path) * mask)
        assert int(mask.sum()) >= round(0.05 * mask.numel())


def test_nothing_asked_nothing_changed() -> None:
    module = seeded(Cnn)
    report = unstructured(module, 0.0)
    assert report.sparsity == 0
    assert state_hash(report.model) == state_hash(module)
    assert report.stored_bytes <= report.dense_bytes + len(report.layers)  # a byte per layer tells the form


def test_no_layer_dies_at_the_extreme() -> None:
    report = unstructured(seeded(Cnn), 0.99, floor=0.02)
    for layer in report.layers:
        mask = report.masks[layer.name]
        assert int(mask.sum()) >= max(1, round(0.02 * mask.numel()))
    assert unstructured(seeded(Cnn), 0.99, floor=0.0).sparsity == pytest.approx(0.99, abs=0.001)


def test_half_goes_where_nothing_is_said() -> None:
    assert zeros(unstructured(seeded(Mlp)).masks) == RANKED // 2


def test_a_threshold_takes_all_that_scores_less() -> None:
    module = seeded(Mlp)
    report = unstructured(module, threshold=0.1, floor=0.0)
    for path, mask in report.masks.items():
        assert torch.equal(mask, module.get_parameter(path).abs() >= 0.1)
    kept = unstructured(module, threshold=1e9, floor=0.25).masks
    assert {round(float(mask.double().mean()), 3) for mask in kept.values()} == {0.25}
    for wrong in ({"amount": 0.5}, {"allocation": "uniform"}, {"pattern": "2:4"}):
        with pytest.raises(ConfigError, match="threshold"):
            unstructured(module, threshold=0.1, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("reconstruct", [None, "sparsegpt", "obc"])
def test_n_of_m_is_exact_in_convolutions_and_what_does_not_fit_is_named(
    pattern: str, n: int, m: int, reconstruct: Any
) -> None:
    module = seeded(Cnn)
    report = unstructured(module, pattern=pattern, reconstruct=reconstruct, data=BATCHES)
    assert report.skipped == [("stem.weight", f"{pattern} needs inputs in groups of {m}, this weight has 3")]
    assert torch.equal(report.model.get_parameter("stem.weight"), module.get_parameter("stem.weight"))
    for path in ("block.0.weight", "head.weight"):
        weight = report.model.get_parameter(path)
        groups = as_matrix(weight).reshape(-1, m)
        assert ((groups != 0).sum(1) == n).all()
        assert torch.equal(weight != 0, report.masks[path])
    kernel = report.model.get_parameter("block.0.weight")  # [8, 8, 3, 3]: input channels at each place
    assert ((kernel[:, :m] != 0).sum(1) == n).all()
    assert any(note.startswith("no speed-up expected on this runtime") for note in report.notes)
    assert any("stem.weight stays dense" in note for note in report.notes)


def test_n_of_m_keeps_the_largest() -> None:
    module = seeded(Mlp)
    report = unstructured(module, pattern="2:4")
    sizes = module.get_parameter("second.weight").detach().abs().reshape(-1, 4)
    least_kept = sizes.masked_fill(~report.masks["second.weight"].reshape(-1, 4), torch.inf).min(1).values
    most_lost = sizes.masked_fill(report.masks["second.weight"].reshape(-1, 4), 0).max(1).values
    assert (most_lost <= least_kept).all()
    with pytest.raises(ConfigError, match=r"always removes 0\.5"):
        unstructured(module, 0.7, pattern="2:4")
    assert unstructured(module, 0.5, pattern="2:4").sparsity == 0.5


def test_a_model_in_which_no_layer_fits_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"0\.weight: 2:4 needs inputs in groups of 4, this weight has 3"):
        unstructured(nn.Sequential(nn.Linear(3, 4)), pattern="2:4")


def test_blocks_go_as_a_whole() -> None:
    report = unstructured(seeded(Mlp), 0.5, pattern="4x1", allocation="uniform")
    for path in ("first.weight", "second.weight", "last.weight"):
        blocks = report.masks[path].reshape(-1, 4, report.masks[path].shape[1])
        assert ((blocks.sum(1) == 0) | (blocks.sum(1) == 4)).all()
        assert float(report.masks[path].double().mean()) == 0.5


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_allocations_remove_what_was_asked(allocation: Any) -> None:
    report = unstructured(seeded(Mlp), 0.7, allocation=allocation, floor=0.0)
    assert zeros(report.masks) == pytest.approx(0.7 * RANKED, abs=3)
    shares = {layer.sparsity for layer in report.layers}
    assert (max(shares) - min(shares) < 0.01) == (allocation == "uniform")


def test_amounts_per_layer() -> None:
    report = unstructured(seeded(Mlp), allocation={"*": 0.25, "last.*": 0.5})
    assert [layer.sparsity for layer in report.layers] == [0.25, 0.25, 0.5]
    assert [layer.sparsity for layer in unstructured(seeded(Mlp), allocation={"first.*": 0.5}).layers] == [0.5, 0, 0]
    with pytest.raises(ConfigError, match=r"'conv\*' names no layer"):
        unstructured(seeded(Mlp), allocation={"conv*": 0.5})


@pytest.mark.parametrize("method", ["obc", "sparsegpt"])
@pytest.mark.parametrize("build", [Cnn, Depthwise])
def test_reconstruction_answers_more_like_the_original(method: Any, build: Callable[[], nn.Module]) -> None:
    module = seeded(build)
    channels = 3 if build is Cnn else 4
    data = [normal(64, channels, 8, 8, seed=seed) for seed in range(3)]
    unseen = normal(64, channels, 8, 8, seed=9)

    def error(report: SparsityReport) -> float:
        with torch.no_grad():
            return float((report.model(unseen) - module(unseen)).square().mean())

    plain = unstructured(module, 0.5, allocation="uniform")
    repaired = unstructured(module, 0.5, allocation="uniform", reconstruct=method, data=data)
    assert repaired.sparsity == pytest.approx(plain.sparsity, abs=0.02)
    assert error(repaired) < error(plain)
    for path, mask in repaired.masks.items():
        assert (repaired.model.get_parameter(path)[~mask] == 0).all()


def test_what_data_never_reaches_stays_dense_and_is_named() -> None:
    report = unstructured(
        seeded(Transformer),
        0.5,
        criterion="wanda",
        data=[{"input_ids": TEXT_DATA["input_ids"], "mask": TEXT_DATA["mask"]}],
    )
    assert zeros(report.masks) > 0
    alone = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    alone.forward = lambda values: alone["used"](values)  # type: ignore[method-assign]
    report = unstructured(alone, 0.5, criterion="wanda", data=normal(8, 4))
    assert [path for path, _ in report.skipped] == ["unused.weight"]
    assert "no gram was measured" in report.skipped[0][1]
    assert report.sparsity == 0.25  # of all weights


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"criterion": "wanda"}, "criterion 'wanda' is measured on data .*pass data="),
        ({"criterion": "taylor"}, "pass data=.*loss="),
        ({"criterion": "taylor", "data": BATCHES}, "criterion 'taylor' is taken from gradients; pass loss="),
        ({"reconstruct": "obc"}, "reconstruct 'obc' is measured on data .*pass data="),
        ({"reconstruct": "obc", "pattern": "4x1", "data": BATCHES}, "not blocks 4x1"),
        ({"pattern": "4:2"}, r"Sparsity\.pattern.*'2:4'.*'4:2'"),
        ({"allocation": "local"}, r"Sparsity\.allocation"),
        ({"sparsity": 0.5}, r"Sparsity\.sparsity"),
    ],
)
def test_what_is_missing_or_wrong_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        unstructured(seeded(Cnn), **settings)


def test_in_place_changes_the_model_itself() -> None:
    module = seeded(Mlp)
    report = unstructured(module, 0.5, inplace=True)
    assert report.model is module
    assert zeros({path: module.get_parameter(path) != 0 for path in report.masks}) == RANKED // 2


def test_stored_bytes_follow_the_pattern() -> None:
    module = nn.Linear(64, 64, bias=False)
    dense = 64 * 64 * 4
    assert unstructured(module, 0.5).stored_bytes == 1 + dense // 2 + 64 * 64 // 8
    assert unstructured(module, pattern="2:4").stored_bytes == 1 + dense // 2 + 64 * 64 // 2 * 2 // 8
    assert unstructured(module, 0.75, pattern="8x8").stored_bytes == 1 + dense // 4 + 64 // 8
    report = unstructured(module, 0.9)
    assert report.dense_bytes == dense
    assert report.notes[1] == f"{report.stored_bytes:,} bytes if stored sparse, {dense:,} dense"


def test_finalize_makes_it_permanent() -> None:
    report = unstructured(seeded(Mlp), 0.5)
    with torch.no_grad():
        report.model.get_parameter("first.weight").add_(1)
    assert report.finalize() is report.model
    assert (report.model.get_parameter("first.weight")[~report.masks["first.weight"]] == 0).all()


@pytest.mark.parametrize("settings", [{"sparsity": 0.5, "criterion": "wanda"}, {"sparsity": 0.5, "criterion": "taylor"},
                                      {"pattern": "2:4", "reconstruct": "sparsegpt"}])  # fmt: skip
def test_the_step_measures_on_the_calibrate_split(settings: dict[str, Any]) -> None:
    step, module = Unstructured(**settings), seeded(Cnn)
    assert step.needs == {"calibrate"}
    context = context_for(module, None, calibrate=(CNN_DATA, integers(5, 48)))
    done = step.apply(Candidate(module), context)
    assert 0.4 < 1 - sum(int(m.sum()) for m in done.masks.values()) / sum(m.numel() for m in done.masks.values()) < 0.6
    with pytest.raises(DataError, match=r"prune\.unstructured needs a 'calibrate' split"):
        step.apply(Candidate(module), context_for(module, None, report=CNN_DATA))


def test_the_step_asks_for_what_its_settings_need() -> None:
    assert Unstructured(sparsity=0.5).needs == frozenset()
    context = context_for(seeded(Cnn), CNN_DATA)
    with pytest.raises(DataError, match="'taylor' needs labels"):
        Unstructured(sparsity=0.5, criterion="taylor").apply(Candidate(seeded(Cnn)), context)
    with pytest.raises(ConfigError, match="expected a sparsity or a threshold"):
        Unstructured()
    assert Unstructured(pattern="2:4").sparsity is None
    with pytest.raises(ConfigError, match="either an amount or a threshold"):
        Unstructured(sparsity=0.5, threshold=0.1)


@pytest.mark.parametrize(("amount", "floor"), [(0.5, 0.01), (0.99, 0.0), (0.9, 0.25)])
def test_every_output_loses_the_same_share(amount: float, floor: float) -> None:
    report = unstructured(seeded(Cnn), amount, criterion="wanda", allocation="output", floor=floor, data=BATCHES)
    for mask in report.masks.values():
        columns = mask[0].numel()
        left = {columns - min(round(amount * columns), columns - max(1, round(floor * columns)))}
        assert set(mask.flatten(1).sum(1).tolist()) == left
    with pytest.raises(ConfigError, match="allocation output ranks single weights"):
        unstructured(seeded(Cnn), amount, pattern="4x1", allocation="output")


def test_equal_outputs_survive_recovery_and_int8() -> None:
    module = seeded(Cnn)
    context = context_for(module, None, train=(CNN_DATA, integers(5, 48)))
    candidate = Candidate(module)
    for step in (Unstructured(sparsity=0.5, allocation="output"), Recover(schedule=Schedule(batch_size=16)), Static()):
        candidate = step.apply(candidate, context)
    assert candidate.precision == "int8"
    assert all(
        (candidate.for_weights().module.get_parameter(path)[~mask] == 0).all() for path, mask in candidate.masks.items()
    )
