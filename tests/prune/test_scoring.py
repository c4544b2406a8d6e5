from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tersor.errors import ConfigError, NonFiniteError, UnsupportedError
from tersor.graph.coupling.family import Family, Place
from tersor.probe import Evidence, collect
from tersor.prune import criteria
from tersor.prune.criteria.base import Criterion
from tersor.prune.scoring import Scorer, unit_scores
from zoo import CNN_DATA, Cnn, integers, normal, seeded

UNITS = torch.arange(8)[:, None]


def family(**members: Tensor) -> Family:
    """Places by keyword: `a__0` is dimension 0 of parameter `a`."""
    places = {}
    for key, indices in members.items():
        name, dim = key.rsplit("__", 1)
        places[Place(name, int(dim))] = indices
    return Family(name=str(next(iter(places))), kind="channel", members=places)


def of_cnn() -> Family:
    """The channels of the zoo's Cnn: stem and its norm, the block and its norm, 16 pixels of each at the head."""
    head = torch.arange(8 * 16).reshape(8, 16)
    alike = ("stem.weight", "stem_norm.weight", "stem_norm.bias", "stem_norm.running_mean", "block.0.weight")
    alike += ("block.0.bias", "block.1.weight", "block.1.bias", "block.1.running_var")
    members = {Place(name, 0): UNITS for name in alike} | {
        Place("block.0.weight", 1): UNITS,
        Place("head.weight", 1): head,
    }
    return Family(name="stem.weight[0]", kind="channel", members=members)


def test_a_unit_adds_up_all_it_owns() -> None:
    tensors = {"a": normal(4, 3, 2), "b": normal(5, 8), "c": normal(4)}
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    one = torch.arange(4)[:, None]
    group = family(a__0=one, b__1=pairs, c__0=one, buffer__0=one)
    expected = torch.stack(
        [
            tensors["a"].abs().sum((1, 2)),
            torch.stack([tensors["b"][:, pair].abs().sum() for pair in pairs]),
            tensors["c"].abs(),
        ]
    )
    plain = {"normalise": "none"}
    assert torch.allclose(unit_scores(group, tensors, {}, criteria.l1, **plain), expected.mean(0))  # type: ignore[arg-type]
    assert torch.allclose(unit_scores(group, tensors, {}, criteria.l1, reduction="sum", **plain), expected.sum(0))  # type: ignore[arg-type]
    assert torch.allclose(unit_scores(group, tensors, {}, criteria.l1, reduction="max", **plain), expected.amax(0))  # type: ignore[arg-type]
    sized = unit_scores(group, tensors, {}, criteria.l1, reduction="sum", normalise="size")
    assert torch.allclose(sized, expected.sum(0) / (6 + 10 + 1))


def test_units_in_any_order() -> None:
    tensors = {"a": normal(6, 3)}
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    plain = unit_scores(family(a__0=torch.arange(6)[:, None]), tensors, {}, criteria.l2)
    assert torch.allclose(unit_scores(family(a__0=order[:, None]), tensors, {}, criteria.l2), plain[order])


@settings(max_examples=40, deadline=None)
@given(
    units=st.integers(1, 12),
    scale=st.sampled_from([1e-8, 1e-3, 7.0, 1e6]),
    reduction=st.sampled_from(["sum", "mean", "max"]),
    seed=st.integers(0, 99),
)
def test_normalised_scores_do_not_depend_on_the_scale_of_a_family(
    units: int, scale: float, reduction: Any, seed: int
) -> None:
    group = family(a__0=torch.arange(units)[:, None], b__1=torch.arange(units)[:, None])
    tensors = {"a": normal(units, 3, seed=seed), "b": normal(2, units, seed=seed + 1)}
    larger = {name: tensor * scale for name, tensor in tensors.items()}
    for normalise, size in (("mean", torch.mean), ("max", torch.amax)):
        scores = unit_scores(group, tensors, {}, criteria.l1, reduction=reduction, normalise=normalise)  # type: ignore[arg-type]
        again = unit_scores(group, larger, {}, criteria.l1, reduction=reduction, normalise=normalise)  # type: ignore[arg-type]
        assert torch.allclose(scores, again, rtol=1e-4)
        assert float(size(scores)) == pytest.approx(1, rel=1e-4)
        raw = unit_scores(group, tensors, {}, criteria.l1, reduction=reduction, normalise="none")
        assert int(raw.argmin()) == int(scores.argmin())


@pytest.mark.parametrize("name", sorted(set(criteria.__all__) - {"random", "order"}))
@pytest.mark.parametrize("unit", [0, 5])
def test_a_unit_that_does_nothing_scores_lowest(name: str, unit: int) -> None:
    model, criterion = seeded(Cnn), getattr(criteria, name)
    group = of_cnn()
    with torch.no_grad():
        for place, members in group.members.items():
            if place.parameter in dict(model.named_parameters()):
                model.get_parameter(place.parameter).index_fill_(place.dim, members[unit], 0)
    data = [(CNN_DATA, integers(5, 48))]
    found = collect(model, data, needs=criterion.needs, loss=functional.cross_entropy)
    scores = unit_scores(group, dict(model.named_parameters()), found, criterion)
    assert scores.shape == (8,)
    if name == "movement":  # signed: what does nothing does not move
        assert float(scores[unit]) == 0
    elif name == "fpgm":  # judges distances, not sizes
        assert bool(torch.isfinite(scores).all())
    else:
        assert int(scores.argmin()) == unit


@pytest.mark.parametrize("name", criteria.__all__)
def test_a_ranking_of_units_does_not_change_when_they_are_computed_together(name: str) -> None:
    model, criterion = seeded(Cnn), getattr(criteria, name)
    found = collect(model, [(CNN_DATA, integers(5, 48))], needs=criterion.needs, loss=functional.cross_entropy)
    scorer = Scorer(dict(model.named_parameters()), found, criterion)
    first = scorer(of_cnn())
    assert torch.equal(first, scorer(of_cnn()))
    assert torch.equal(first, unit_scores(of_cnn(), dict(model.named_parameters()), found, criterion))


def test_each_weight_is_scored_once() -> None:
    seen = []

    def entries(weight: Tensor, evidence: Evidence) -> Tensor:
        seen.append(weight.shape)
        return weight.abs()

    scorer = Scorer({"a": normal(8, 8, 3)}, {}, Criterion(entries=entries))
    for _ in range(3):
        scorer(family(a__0=UNITS, a__1=UNITS))
        scorer(family(a__1=UNITS))
    assert seen == [(8, 8, 3)]


def test_terms_cancel_before_they_are_squared() -> None:
    weight = torch.tensor([[1.0, -1.0], [1.0, 0.5]])
    known = {"a": Evidence(gradient=torch.ones(2, 2))}
    group = family(a__0=torch.tensor([[0], [1]]))
    assert unit_scores(group, {"a": weight}, known, criteria.taylor, normalise="none").tolist() == [0, 2.25]
    together = unit_scores(family(a__0=torch.tensor([[0, 1]])), {"a": weight}, known, criteria.taylor, normalise="none")
    assert together.tolist() == [2.25]


def test_negative_scores_keep_their_order() -> None:
    known = {"a": Evidence(movement=torch.tensor([[-5.0], [-1.0], [2.0]]))}
    for normalise in ("none", "mean", "max", "size"):
        scores = unit_scores(
            family(a__0=torch.arange(3)[:, None]),
            {"a": normal(3, 1)},
            known,
            criteria.movement,
            normalise=normalise,  # type: ignore[arg-type]
        )
        assert scores.argsort().tolist() == [0, 1, 2]


def test_a_family_of_zeros_stays_zero() -> None:
    for normalise in ("mean", "max"):
        scores = unit_scores(family(a__0=UNITS), {"a": torch.zeros(8, 2)}, {}, criteria.l1, normalise=normalise)  # type: ignore[arg-type]
        assert scores.tolist() == [0] * 8


def test_only_learned_floating_parameters_that_were_measured_have_a_say() -> None:
    tensors = {"a": normal(8, 3), "counts": torch.arange(8), "bias": normal(8)}
    found = {"a": Evidence(gram=torch.eye(3)), "bias": Evidence()}
    group = family(counts__0=UNITS, bias__0=UNITS, a__0=UNITS, buffer__0=UNITS)
    scores = unit_scores(group, tensors, found, criteria.wanda, normalise="none")
    assert torch.allclose(scores, tensors["a"].abs().sum(1))


def test_unsuitable_pairs_are_refused() -> None:
    tensors = {"a": normal(8, 3)}
    with pytest.raises(UnsupportedError, match=r"batchnorm_scale.*a\[0\]"):
        unit_scores(family(a__0=UNITS), tensors, {}, criteria.batchnorm_scale)
    with pytest.raises(UnsupportedError, match="fpgm"):
        unit_scores(family(a__1=torch.arange(3)[:, None]), tensors, {}, criteria.fpgm)
    with pytest.raises(UnsupportedError, match="wanda"):
        unit_scores(family(a__0=UNITS), tensors, {"other": Evidence(gram=torch.eye(2))}, criteria.wanda)


@pytest.mark.parametrize("name", sorted(name for name in criteria.__all__ if getattr(criteria, name).needs))
def test_missing_data_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*data="):
        unit_scores(family(a__0=UNITS), {"a": normal(8, 3)}, {"a": Evidence()}, getattr(criteria, name))


def test_bad_options_and_bad_weights_are_named() -> None:
    with pytest.raises(ConfigError, match="reduction"):
        Scorer({}, {}, criteria.l1, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="normalise"):
        Scorer({}, {}, criteria.l1, normalise="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no entries, slices or units"):
        unit_scores(family(a__0=UNITS), {"a": normal(8, 3)}, {}, Criterion())
    with pytest.raises(NonFiniteError, match="'a'"):
        unit_scores(family(a__0=UNITS), {"a": normal(8, 3) * torch.nan}, {}, criteria.l1)
