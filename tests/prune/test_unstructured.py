from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.candidate import Candidate
from tersor.distill import Recover
from tersor.errors import ConfigError, UnsupportedError
from tersor.graph import lower
from tersor.prune import Unstructured, unstructured_masks
from tersor.quantize import Static
from tersor.train import Schedule
from zoo import (
    CNN_DATA,
    MLP_DATA,
    TEXT_DATA,
    TEXT_DYNAMIC,
    Cnn,
    Mlp,
    Transformer,
    context_for,
    integers,
    normal,
    seeded,
    state_hash,
)

RANKED = 12 * 16 + 16 * 16 + 16 * 4  # weights of the Mlp


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
        least = max(1, round(floor * weight.numel()))
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
    with pytest.raises(ConfigError, match="sparsity"):
        unstructured_masks(seeded(Mlp), sparsity)
    with pytest.raises(ConfigError, match=r"Unstructured\.sparsity"):
        Unstructured(sparsity=sparsity)


def test_an_impossible_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor"):
        unstructured_masks(seeded(Mlp), 0.5, floor=1.0)


def test_an_unknown_criterion_is_refused_naming_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"\['magnitude'\], got 'taylor'"):
        unstructured_masks(seeded(Mlp), 0.5, criterion="taylor")
    with pytest.raises(ConfigError, match=r"Unstructured\.criterion.*magnitude.*'taylor'"):
        Unstructured(sparsity=0.5, criterion="taylor")


def test_a_model_without_weights_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="BatchNorm1d has no parameter"):
        unstructured_masks(nn.BatchNorm1d(3), 0.5)
