"""`prune.sparse_learning` in a recipe: pushes what the next `prune.structured` removes, and cuts nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.errors import ConfigError, CoverageError, DataError
from tersor.prune import SparseLearning, Structured, Unstructured, choose_units
from tersor.prune.masks import check, sparsity_of
from tersor.recipes import dump_recipe, parse_recipe
from zoo import MLP_DATA, Mlp, context_for, integers, quantized, seeded, state_hash

LABELS = (MLP_DATA[:, 0] * MLP_DATA[:, 1] > 0).long()
STRONG: dict[str, Any] = {
    "penalty": {"strength": 0.05, "every": 1},
    "schedule": {"epochs": 20, "lr": 0.05, "batch_size": 16},
}


def mlp() -> nn.Module:
    return seeded(lambda: Mlp(2))


def learned(units: dict[str, Any], module: nn.Module | None = None, **settings: Any) -> Candidate:
    module = mlp() if module is None else module
    context = context_for(module, None, train=(MLP_DATA, LABELS))
    return SparseLearning(units=units, **{**STRONG, **settings}).apply(Candidate(frozen_copy(module)), context)


def removed(candidate: Candidate, size: int = 16) -> dict[str, set[int]]:
    return {
        cut.parameter: set(range(size)) - set(cut.kept)
        for cut in candidate.surgeries[-1].cuts
        if cut.dim == 0 and cut.parameter.endswith("weight")
    }


@pytest.mark.parametrize("units", [{"amount": 0.5}, {"amount": 0.25, "criterion": "taylor", "kinds": ["channel"]}])
def test_what_is_pushed_is_what_goes_next_and_it_costs_little(units: dict[str, Any]) -> None:
    module = mlp()
    context = context_for(module, None, train=(MLP_DATA, LABELS))
    step = SparseLearning(units=units, **STRONG)
    chosen = step.choose(frozen_copy(module), context)
    done = step.apply(Candidate(frozen_copy(module)), context)
    assert done.surgeries == ()
    assert state_hash(module) == state_hash(mlp())
    cut = Structured(amount=units["amount"]).apply(done, context)
    expected = {f"{name.partition('[')[0]}": set(gone.tolist()) for name, gone in chosen.units.items()}
    assert removed(cut) == expected
    plain = Structured(amount=units["amount"]).apply(Candidate(frozen_copy(module)), context)
    with torch.no_grad():
        cost = (cut.module(MLP_DATA) - done.module(MLP_DATA)).norm() / done.module(MLP_DATA).norm()
        unlearned = (plain.module(MLP_DATA) - module(MLP_DATA)).norm() / module(MLP_DATA).norm()
    assert float(cost) < 0.05 < 0.2 < float(unlearned)


def test_the_notes_tell_the_norms() -> None:
    done = learned({"amount": 0.5})
    record = done.history[0]
    assert (record.name, record.pruning) == ("prune.sparse_learning", None)
    found = re.match(
        r"16 of 32 units pushed: their mean norm (\S+) -> (\S+), that of the others (\S+) -> (\S+)", record.notes[0]
    )
    assert found is not None
    old, new, _, others = map(float, found.groups())
    assert new < 0.1 * min(old, others)
    assert record.notes[1] == "16 of the pushed units are among the smallest of their families now"
    assert record.notes[2].startswith("loss by epoch: ")
    assert record.notes[2].count(",") == 19


def test_a_lasso_pushes_all_units_that_are_in_question() -> None:
    penalty = {"method": "lasso", "strength": 0.02}
    step = SparseLearning(units={"criterion": "taylor", "exclude": ["second.*"]}, penalty=penalty)
    assert step.needs == {"train"}
    done = learned({"criterion": "taylor", "exclude": ["second.*"]}, penalty=penalty)
    before, after = mlp().get_parameter("first.weight"), done.module.get_parameter("first.weight")
    assert float(after.detach().norm()) < 0.8 * float(before.detach().norm())
    assert done.history[0].notes[0].startswith("16 of 32 units pushed: ")
    done = learned({}, penalty=penalty)
    assert done.history[0].notes[0].startswith("32 of 32 units pushed: ")
    assert "others" not in done.history[0].notes[0]


def test_masks_hold() -> None:
    module = mlp()
    context = context_for(module, None, train=(MLP_DATA, LABELS))
    sparse = Unstructured(sparsity=0.5).apply(Candidate(frozen_copy(module)), context)
    done = SparseLearning(units={"amount": 0.5}, **STRONG).apply(sparse, context)
    check(done.module, done.masks)
    assert done.masks == sparse.masks
    assert sparsity_of(done.masks) == pytest.approx(0.5, abs=0.01)


def test_it_needs_what_it_reads() -> None:
    assert SparseLearning().needs == {"train"}
    assert SparseLearning(units={"compensate": True}).needs == {"train"}
    step = SparseLearning(units={"criterion": "taylor"})
    assert step.needs == {"train", "calibrate"}
    module = mlp()
    with pytest.raises(DataError, match=r"prune\.sparse_learning needs a 'train' split"):
        step.apply(Candidate(frozen_copy(module)), context_for(module, (MLP_DATA, LABELS)))
    unlabelled = context_for(module, None, train=(MLP_DATA, LABELS), calibrate=MLP_DATA)
    with pytest.raises(DataError, match=r"criterion 'taylor' needs labels in the 'calibrate' split"):
        step.apply(Candidate(frozen_copy(module)), unlabelled)
    with pytest.raises(DataError, match=r"prune\.sparse_learning trains with the task's loss, but .* no labels"):
        SparseLearning().apply(Candidate(frozen_copy(module)), context_for(module, None, train=MLP_DATA))


def test_what_pruning_refuses_is_refused_before_training() -> None:
    with pytest.raises(CoverageError, match="excluded"):
        learned({"exclude": ["*"]})


def test_too_little_pushes_nothing_and_says_so() -> None:
    assert "none was pushed" in learned({"amount": 0.01}, schedule={"epochs": 1}).history[0].notes[0]


def test_numbers_of_macs_are_per_example() -> None:
    module = mlp()
    context = context_for(module, None, train=(MLP_DATA, LABELS))
    chosen = SparseLearning(units={"target": {"macs": 250}}).choose(module, context)
    alone = choose_units(module, MLP_DATA[:1], target={"macs": 250})
    assert {name: units.tolist() for name, units in chosen.units.items()} == {
        name: units.tolist() for name, units in alone.units.items()
    }


def test_after_quantization_it_starts_from_the_rounded_weights() -> None:
    module = mlp()
    context = context_for(module, None, train=(MLP_DATA, LABELS))
    done = SparseLearning(schedule={"epochs": 1}).apply(quantized(module, context), context)
    assert (done.plan, done.simulation) == (None, None)


def test_recipes_know_it() -> None:
    text = """
steps:
  - prune.sparse_learning:
      units: {amount: 0.3, exclude: ["first.*"]}
      penalty: {method: growing, strength: 0.01}
      schedule: {epochs: 2}
  - prune.structured: {amount: 0.3, exclude: ["first.*"]}
"""
    recipe = parse_recipe(text)
    first = recipe.steps[0]
    assert isinstance(first, SparseLearning)
    assert (first.units.amount, first.units.exclude, first.schedule.epochs) == (0.3, ("first.*",), 2)
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "wrong", [{"units": {"amount": 1.0}}, {"units": {"x": 1}}, {"penalty": {"method": "x"}}, {"samples": 0}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        SparseLearning(**wrong)


def test_the_same_step_gives_the_same_bits() -> None:
    hashes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        hashes.add(state_hash(learned({"amount": 0.5}, schedule={"epochs": 2}).module))
    assert len(hashes) == 1


def test_labels_may_be_for_many_classes() -> None:
    module = seeded(Mlp)
    context = context_for(module, None, train=(MLP_DATA, integers(4, 48)))
    done = SparseLearning(schedule={"epochs": 1, "batch_size": 47}).apply(Candidate(frozen_copy(module)), context)
    answer: Tensor = done.module(MLP_DATA)
    assert torch.isfinite(answer).all()
