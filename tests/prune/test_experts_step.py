"""`prune.experts` in a recipe: what it needs, what it tells, and that masks go along."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from specimens.mixtures import TOKENS, Listed, Stacked, built
from tersor.core.candidate import Candidate, frozen_copy
from tersor.errors import DataError
from tersor.graph import apply_surgery
from tersor.prune import ExpertsStep, Unstructured
from tersor.prune.masks import check
from tersor.recipes import dump_recipe, parse_recipe
from zoo import context_for, integers

LABELS = integers(4, len(TOKENS))


def step(net: nn.Module, data: Any, **settings: Any) -> Candidate:
    return ExpertsStep(**settings).apply(Candidate(frozen_copy(net)), context_for(net, data))


def test_the_step_tells_what_it_did() -> None:
    net = built(Listed, Stacked)
    done = step(net, (TOKENS, LABELS), amount=0.34)
    record = done.history[0]
    pruning = record.pruning
    assert record.name == "prune.experts"
    assert pruning is not None
    assert [(item.name, item.kind, item.units, item.kept) for item in pruning.families] == [
        ("mixtures.0", "expert", 6, 4), ("mixtures.1", "expert", 6, 4)
    ]  # fmt: skip
    assert pruning.families[1].layers == ["mixtures.1", "mixtures.1.router.linear"]
    assert pruning.amount == pytest.approx(1 / 3)
    assert 0.7 < pruning.coverage < 1
    assert pruning.max_error is not None
    assert pruning.parameters_after < pruning.parameters_before
    assert "33.3% of the units of 2 families removed" in "\n".join(record.notes)
    replayed = apply_surgery(frozen_copy(net), done.surgeries[0])
    replayed.load_state_dict(done.module.state_dict())
    assert torch.equal(replayed(TOKENS), done.module(TOKENS))


def test_the_step_says_what_it_needs() -> None:
    net = built(Listed)
    assert ExpertsStep().needs == ExpertsStep(criterion="loss").needs == {"calibrate"}
    assert ExpertsStep(criterion="random").needs == ExpertsStep(experts={"mixtures.0": (1,)}).needs == frozenset()
    with pytest.raises(DataError, match=r"prune\.experts needs a 'calibrate' split"):
        ExpertsStep().apply(Candidate(frozen_copy(net)), context_for(net, None, report=(TOKENS, LABELS)))
    with pytest.raises(DataError, match=r"criterion 'loss' needs labels in the 'calibrate' split.*'usage'"):
        step(net, TOKENS, criterion="loss")
    by_loss = step(net, (TOKENS, LABELS), criterion="loss", amount=0.2)
    assert by_loss.history[0].settings["criterion"] == "loss"


def test_masks_shrink_with_the_experts() -> None:
    net = built(partial(Listed, keyed=True), Listed, Stacked)
    context = context_for(net, (TOKENS, LABELS))
    sparse = Unstructured(sparsity=0.5).apply(Candidate(frozen_copy(net)), context)
    assert "mixtures.2.up" in sparse.masks or "mixtures.0.experts.expert_5.up.weight" in sparse.masks
    done = ExpertsStep(amount=0.34).apply(sparse, context)
    paths = dict(done.module.named_parameters())
    assert {name: mask.shape for name, mask in done.masks.items()} == {name: paths[name].shape for name in done.masks}
    assert sum("experts" in name for name in done.masks) == 2 * 2 * 4
    check(done.module, done.masks)


def test_recipes_know_it() -> None:
    text = "steps:\n  - prune.experts: {amount: 0.25, exclude: ['*.0.*']}\n"
    recipe = parse_recipe(text)
    assert recipe.steps == (ExpertsStep(amount=0.25, exclude=("*.0.*",)),)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    named = parse_recipe("steps:\n  - prune.experts: {experts: {mixtures.0: [1, 2]}}\n")
    assert named.steps == (ExpertsStep(experts={"mixtures.0": (1, 2)}),)
    assert parse_recipe(dump_recipe(named)) == named
