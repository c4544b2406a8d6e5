from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ConfigError
from tersor.graph.coupling.family import Family, Place
from tersor.probe import Evidence, collect
from tersor.probe.hessian import output_error
from tersor.prune import criteria
from tersor.prune.criteria.base import Criterion, per_column
from tersor.prune.reconstruction import refit
from zoo import Depthwise, Mlp, integers, normal, relative, seeded

KNOWN: dict[str, Criterion] = {name: getattr(criteria, name) for name in criteria.__all__}
ENTRIES = sorted(name for name, criterion in KNOWN.items() if criterion.entries is not None)
# How a score grows when the weight is doubled and everything that was measured stays.
DEGREE = {
    "l1": 1,
    "l2": 2,
    "lamp": 0,
    "taylor": 1,
    "fisher": 2,
    "obd": 2,
    "obs": 2,
    "wanda": 1,
    "random": 0,
    "movement": 0,
}
WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-100, 100, width=32)
)


def gram_of(columns: int, seed: int = 0) -> Tensor:
    inputs = normal(columns, 3 * columns, seed=seed) * torch.linspace(0.2, 2, columns)[:, None]
    return inputs @ inputs.T / inputs.shape[1]


def evidence_for(weight: Tensor, **fields: Any) -> Evidence:
    columns = weight[0].numel()
    return Evidence(
        gradient=normal(*weight.shape, seed=1),
        squared_gradient=normal(*weight.shape, seed=2).square(),
        movement=normal(*weight.shape, seed=3),
        gram=gram_of(columns),
        zero_share=torch.linspace(0, 1, len(weight)),
        **({"role": "weight"} | fields),
    )


def entries(name: str, weight: Tensor, evidence: Evidence) -> Tensor:
    function = KNOWN[name].entries
    assert function is not None
    return function(weight, evidence)


def slices(name: str, weight: Tensor, dim: int, evidence: Evidence) -> Tensor | None:
    function = KNOWN[name].slices
    assert function is not None
    return function(weight, dim, evidence)


def test_every_criterion_knows_its_name_and_scores_in_one_way() -> None:
    for name, criterion in KNOWN.items():
        assert criterion.name == name
        ways = (criterion.entries, criterion.slices, criterion.units)
        assert [way is None for way in ways].count(False) == 1


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.sampled_from(ENTRIES))
def test_scores_are_finite_and_grow_with_the_weight_as_the_formula_says(
    values: np.ndarray[Any, Any], name: str
) -> None:
    weight = torch.from_numpy(values)
    before = weight.clone()
    evidence = evidence_for(weight)
    scores = entries(name, weight, evidence)
    assert scores.shape == weight.shape
    assert bool(torch.isfinite(scores).all())
    assert name == "movement" or bool((scores >= 0).all())
    doubled = entries(name, 2 * weight, evidence)
    assert torch.allclose(doubled, scores * 2 ** DEGREE[name], rtol=1e-4, atol=1e-30)
    assert torch.equal(weight, before)


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.sampled_from(sorted(set(ENTRIES) - {"random", "movement"})))
def test_a_zero_weight_scores_lowest(values: np.ndarray[Any, Any], name: str) -> None:
    weight = torch.from_numpy(values).clone()
    weight.view(-1)[-1] = 0
    scores = entries(name, weight, evidence_for(weight))
    assert float(scores.view(-1)[-1]) == 0
    assert float(scores.min()) == 0


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"random", "order"}))
@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_scores_follow_the_outputs_when_they_are_reordered(name: str, order: list[int]) -> None:
    weight = normal(4, 3, 2)
    role = "scale" if name == "batchnorm_scale" else "weight"
    if role == "scale":
        weight = weight[:, 0, 0]
    known = evidence_for(weight, role=role) if weight.ndim > 1 else Evidence(role="scale")
    moved = {
        field: None if getattr(known, field) is None else getattr(known, field)[order]
        for field in ("gradient", "squared_gradient", "movement", "zero_share")
    }
    permuted = Evidence(**moved, gram=known.gram, role=known.role)
    score = entries if KNOWN[name].entries is not None else lambda name, weight, known: slices(name, weight, 0, known)
    before, after = score(name, weight, known), score(name, weight[order], permuted)
    assert before is not None
    assert after is not None
    assert torch.allclose(before[order], after, rtol=1e-5)


def test_random_scores_are_the_same_every_time_and_look_random() -> None:
    scores = entries("random", normal(40, 50), Evidence())
    assert torch.equal(scores, entries("random", normal(40, 50, seed=1), Evidence()))
    assert not torch.equal(scores.T, entries("random", normal(50, 40), Evidence()))
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.05)
    assert len(scores.unique()) > 1900


def test_lamp_is_the_share_of_what_is_left() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    expected = torch.tensor([[1 / 14, 4 / 13], [1.0, 0.25 / 14.25]])
    assert torch.allclose(entries("lamp", weight, Evidence()), expected)
    assert torch.allclose(entries("lamp", 1e-25 * weight, Evidence()), expected)


def test_fisher_and_taylor_halve_and_multiply() -> None:
    weight, known = (
        torch.tensor([[2.0, -3.0]]),
        Evidence(gradient=torch.tensor([[0.5, 4]]), squared_gradient=torch.tensor([[5.0, 1]])),
    )
    assert entries("fisher", weight, known).tolist() == [[10, 4.5]]
    assert entries("taylor", weight, known).tolist() == [[1, 12]]
    terms = criteria.taylor.terms
    assert terms is not None
    assert terms(weight, known).tolist() == [[1, -12]]


def test_taylor_predicts_a_small_change_of_the_loss() -> None:
    model, x, y = seeded(Mlp), normal(30, 12), integers(4, 30)
    found = collect(model, [(x, y)], needs=["gradient"], loss=functional.cross_entropy)["second.weight"]
    weight = model.get_parameter("second.weight")
    scores = entries("taylor", weight, found)
    before = functional.cross_entropy(model(x), y)
    for row, column in [(0, 0), (3, 7), (15, 2)]:
        with torch.no_grad():
            old = weight[row, column].clone()
            weight[row, column] = old * (1 - 1e-2)
            change = float((functional.cross_entropy(model(x), y) - before).abs()) / 1e-2
            weight[row, column] = old
        assert change == pytest.approx(float(scores[row, column]), rel=0.1, abs=1e-5)


def test_obd_is_the_error_of_zeroing_and_obs_of_zeroing_and_refitting() -> None:
    weight, gram = normal(3, 6).double(), gram_of(6).double()
    known = Evidence(gram=gram)
    damage, surgeon = entries("obd", weight, known), entries("obs", weight, known)
    assert bool((surgeon <= damage + 0.01 * gram.diagonal().mean() * weight.square()).all())  # up to the damping
    for column in range(6):
        rest = [other for other in range(6) if other != column]
        zeroed, refitted = weight.clone(), torch.zeros_like(weight)
        zeroed[:, column] = 0
        refitted[:, rest] = refit(weight, gram, rest, damping=0)
        for row in range(3):
            alone = weight.clone()
            alone[row] = zeroed[row]
            assert output_error(weight, alone, gram) == pytest.approx(float(damage[row, column]))
            alone[row] = refitted[row]
            error = output_error(weight, alone, gram)
            assert error <= float(surgeon[row, column])
            assert error > 0.5 * float(surgeon[row, column])


def test_wanda_is_the_root_of_obd() -> None:
    weight = normal(4, 2, 3, 3)
    known = evidence_for(weight)
    assert torch.allclose(entries("wanda", weight, known).square(), entries("obd", weight, known), rtol=1e-5)


def test_dead_inputs_and_dead_layers_score_nothing_and_break_nothing() -> None:
    weight, gram = normal(4, 6), gram_of(6)
    gram[2], gram[:, 2] = 0, 0
    for name in ("obd", "wanda"):
        assert bool((entries(name, weight, Evidence(gram=gram))[:, 2] == 0).all())
    surgeon = entries("obs", weight, Evidence(gram=gram))
    others = (surgeon / weight.square())[:, [0, 1, 3, 4, 5]]
    assert bool(((surgeon / weight.square())[:, 2] < others.min()).all())
    for name in ("obd", "wanda", "obs"):
        assert bool(torch.isfinite(entries(name, weight, Evidence(gram=torch.zeros(6, 6)))).all())


@pytest.mark.parametrize("name", ["obd", "obs", "wanda"])
def test_groups_and_transposed_weights_are_scored_like_the_plain_matrix(name: str) -> None:
    grams = torch.stack([gram_of(9, seed) for seed in range(2)])
    weight = normal(6, 1, 3, 3)
    parts = [entries(name, weight[3 * index : 3 * index + 3], Evidence(gram=grams[index])) for index in range(2)]
    assert torch.allclose(entries(name, weight, Evidence(gram=grams)), torch.cat(parts), rtol=1e-4)
    matrix = normal(5, 9)
    plain = entries(name, matrix, Evidence(gram=grams[0]))
    assert torch.allclose(entries(name, matrix.T, Evidence(gram=grams[0], output_dim=1)), plain.T)


def test_per_column_broadcasts_to_the_weight() -> None:
    values = torch.arange(8.0)
    assert per_column(values, normal(3, 2, 2, 2), 0).tolist() == values.reshape(1, 2, 2, 2).tolist()
    assert per_column(values, normal(8, 3), 1).shape == (8, 1)


def test_fpgm_removes_the_filter_that_the_others_can_replace() -> None:
    weight = normal(5, 3, 2, 2)
    weight[3] = weight.clone()[[0, 1, 2, 4]].mean(0)
    scores = slices("fpgm", weight, 0, Evidence())
    assert scores is not None
    assert int(scores.argmin()) == 3
    flat = weight.flatten(1)
    assert torch.allclose(scores, (flat[:, None] - flat[None]).norm(dim=2).sum(1))
    assert slices("fpgm", weight, 1, Evidence()) is None
    assert slices("fpgm", weight[:, 0, 0, 0], 0, Evidence()) is None
    turned = slices("fpgm", weight.transpose(0, 1), 1, Evidence(output_dim=1))
    assert turned is not None
    assert torch.allclose(turned, scores)
    same = slices("fpgm", torch.full((4, 1000), 7.3), 0, Evidence())
    assert same is not None
    assert float(same.max()) < 1e-3


def test_batchnorm_scale_speaks_for_scales_only() -> None:
    scale = torch.tensor([0.5, -2.0, 0.1])
    found = slices("batchnorm_scale", scale, 0, Evidence(role="scale"))
    assert found is not None
    assert torch.allclose(found, torch.tensor([0.5, 2.0, 0.1]))
    assert slices("batchnorm_scale", scale, 0, Evidence(role="bias")) is None
    assert slices("batchnorm_scale", normal(3, 3), 0, Evidence(role="weight")) is None


def test_apoz_is_the_share_of_activity() -> None:
    known = Evidence(zero_share=torch.tensor([0.0, 0.25, 1.0]))
    found = slices("apoz", normal(3, 4), 0, known)
    assert found is not None
    assert found.tolist() == [1, 0.75, 0]
    assert slices("apoz", normal(3, 4), 1, known) is None


@pytest.mark.parametrize("rows", [[[0], [1], [2], [3]], [[5, 1], [7, 0], [2, 3], [4, 6]]])
def test_order_counts_units_wherever_they_stand(rows: list[list[int]]) -> None:
    function = criteria.order.units
    assert function is not None
    members = {Place("first.weight", 0): torch.arange(4)[:, None], Place("second.weight", 1): torch.tensor(rows)}
    assert function(Family("first.weight[0]", "channel", members)).tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize(
    "name", sorted(name for name, criterion in KNOWN.items() if criterion.entries and criterion.needs)
)
def test_missing_evidence_is_asked_for(name: str) -> None:
    asked = "data=.*loss=" if name in {"taylor", "fisher", "movement"} else "data="
    with pytest.raises(ConfigError, match=f"'{name}'.*{asked}"):
        entries(name, normal(3, 4), Evidence())


@pytest.mark.parametrize(
    "name", sorted(name for name, criterion in KNOWN.items() if criterion.entries and criterion.needs)
)
def test_evidence_of_another_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="measure again"):
        entries(name, normal(3, 5), evidence_for(normal(3, 4)))


def test_collected_evidence_fits_every_criterion() -> None:
    model = seeded(Depthwise)
    needs = sorted(set().union(*(criterion.needs for criterion in KNOWN.values())))
    data = [(normal(6, 4, 8, 8), integers(3, 6))]
    found = collect(model, data, needs=needs, loss=nn.CrossEntropyLoss())
    for name in ENTRIES:
        for path in ("pointwise.weight", "depthwise.weight", "grouped.weight", "head.weight"):
            scores = entries(name, model.get_parameter(path), found[path])
            assert scores.shape == model.get_parameter(path).shape
            assert bool(torch.isfinite(scores).all())
    assert (
        relative(
            entries("wanda", model.get_parameter("head.weight"), found["head.weight"]),
            model.get_parameter("head.weight").detach().abs() * torch.diagonal(found["head.weight"].gram).sqrt(),  # type: ignore[arg-type]
        )
        < 1e-5
    )
