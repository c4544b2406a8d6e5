"""`prune.depth` in a recipe: what it needs, what it tells, and that it goes along with every other step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.task import Task
from tersor.distill import Recover
from tersor.errors import ConfigError, CoverageError, DataError, SurgeryError
from tersor.graph import apply_surgery
from tersor.prune import DepthStep, Structured, Unstructured
from tersor.prune.masks import check
from tersor.quantize import Static
from tersor.recipes import dump_recipe, parse_recipe
from tersor.train import Schedule
from zoo import MLP_DATA, Mlp, context_for, integers, normal, seeded, state_hash

IMAGES = normal(48, 3, 8, 8)
LABELLED = (IMAGES, integers(5, 48))
BLOCKS = ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]


class Basic(nn.Module):
    """Conv-BN-ReLU-conv-BN and a way around."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.last_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.last_norm(self.last(self.first_norm(self.first(x)).relu()))
        return (x + branch).relu()


class Deep(nn.Module):
    """A stem, four residual blocks, a head; images `[B, 3, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Basic(8) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image).relu()).mean((2, 3)))


def gone(candidate: Candidate) -> list[str]:
    return [block.path for surgery in candidate.surgeries for block in surgery.skipped]


def pruned(module: nn.Module, data: Any, **settings: Any) -> Candidate:
    return DepthStep(**settings).apply(Candidate(frozen_copy(module)), context_for(module, data))


def test_it_removes_blocks_and_tells_what_it_did() -> None:
    module = seeded(Deep)
    before = state_hash(module)
    candidate = Candidate(frozen_copy(module))
    done = DepthStep(amount=0.5).apply(candidate, context_for(module, IMAGES))
    assert state_hash(candidate.module) == state_hash(module) == before
    assert len(gone(done)) == 2
    record = done.history[0]
    assert (record.name, record.settings["amount"], record.settings["samples"]) == ("prune.depth", 0.5, 128)
    pruning = record.pruning
    assert pruning is not None
    block = 2 * 8 * 8 * 9 + 4 * 8
    assert pruning.parameters_before - pruning.parameters_after == 2 * block
    assert pruning.macs_before - pruning.macs_after == 2 * 2 * 8 * 8 * 9 * 64
    assert [(family.name, family.kind, family.units) for family in pruning.families] == [
        (name, "block", 1) for name in BLOCKS
    ]
    assert [family.name for family in pruning.families if not family.kept] == gone(done)
    assert pruning.families[0].layers == [f"blocks.0.{name}" for name in ("first", "last", "first_norm", "last_norm")]
    assert pruning.amount == 0.5
    assert pruning.coverage == pytest.approx(4 * block / pruning.parameters_before)
    assert pruning.max_error is not None
    assert pruning.max_error < 1e-4
    notes = "\n".join(record.notes)
    assert f"2 of 4 blocks removed ({', '.join(gone(done))}); blocks hold " in notes
    assert "verified against the masked model" in notes
    assert "statistics of 4 BatchNorm layers re-estimated" in notes


def test_only_losses_need_the_calibrate_split_and_its_labels() -> None:
    module = seeded(Deep)
    assert DepthStep().needs == DepthStep(criterion="random").needs == frozenset()
    assert DepthStep(criterion="loss", blocks=("blocks.1",)).needs == frozenset()
    step = DepthStep(criterion="loss")
    assert step.needs == {"calibrate"}
    assert len(gone(step.apply(Candidate(frozen_copy(module)), context_for(module, LABELLED)))) == 1
    with pytest.raises(DataError, match=r"prune\.depth needs a 'calibrate' split"):
        step.apply(Candidate(frozen_copy(module)), context_for(module, None, report=LABELLED))
    with pytest.raises(DataError, match=r"criterion 'loss' needs labels in the 'calibrate' split.*'similarity'"):
        step.apply(Candidate(frozen_copy(module)), context_for(module, IMAGES))


def test_without_a_calibrate_split_the_tasks_examples_do() -> None:
    module = seeded(Deep)
    context = context_for(module, None, report=LABELLED)
    done = DepthStep(amount=0.25).apply(Candidate(frozen_copy(module)), context)
    assert len(gone(done)) == 1
    assert not any("BatchNorm" in note for note in done.history[0].notes)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in done.module.state_dict().items())


def test_the_loss_takes_the_block_that_helps_least() -> None:
    module = seeded(Deep)
    context = context_for(module, LABELLED)
    losses = {}
    done = DepthStep(criterion="loss", amount=0.25).apply(Candidate(frozen_copy(module)), context)
    for name in BLOCKS:
        model = frozen_copy(module)
        model.blocks[int(name[-1])] = nn.Identity()  # type: ignore[index, union-attr]
        losses[name] = float(context.task.loss(model(IMAGES), LABELLED[1]))
    assert gone(done) == [min(losses, key=losses.__getitem__)]


def test_named_blocks_go_or_say_why() -> None:
    module = seeded(Deep)
    assert gone(pruned(module, IMAGES, blocks=["blocks.2", "blocks.1"])) == ["blocks.1", "blocks.2"]
    with pytest.raises(SurgeryError, match="no modules"):
        pruned(module, IMAGES, blocks=["blocks.7"])
    with pytest.raises(CoverageError, match="no block"):
        pruned(seeded(Mlp), MLP_DATA)


def test_masks_of_what_is_gone_are_dropped() -> None:
    module, context = seeded(Deep), context_for(seeded(Deep), IMAGES)
    sparse = Unstructured(sparsity=0.5).apply(Candidate(frozen_copy(module)), context)
    done = DepthStep(amount=0.5).apply(sparse, context)
    paths = {name for name, _ in done.module.named_parameters()}
    assert set(done.masks) == set(sparse.masks) & paths
    assert len(done.masks) < len(sparse.masks)
    check(done.module, done.masks)


def steps() -> dict[str, Any]:
    return {
        "depth": DepthStep(amount=0.25),
        "cut": Structured(amount=0.25),
        "zero": Unstructured(sparsity=0.4),
        "train": Recover(schedule=Schedule(epochs=1, lr=0.01, batch_size=16)),
        "int8": Static(samples=20),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("depth", "cut", "train", "int8"),
        ("cut", "depth"),
        ("zero", "depth", "cut", "depth", "train"),
        ("int8", "depth", "train", "int8"),
    ],
    ids="-".join,
)
def test_steps_follow_each_other_in_any_legal_order(names: tuple[str, ...]) -> None:
    module = seeded(Deep)
    context = context_for(module, None, train=LABELLED)
    candidate = Candidate(frozen_copy(module))
    for name in names:
        candidate = steps()[name].apply(candidate, context)
    assert len(gone(candidate)) == names.count("depth")
    check(candidate.module, candidate.masks)
    fresh = frozen_copy(module)
    for surgery in candidate.surgeries:
        fresh = apply_surgery(fresh, surgery)
    fresh.load_state_dict(candidate.module.state_dict())
    with torch.no_grad():
        assert torch.isfinite(candidate.runnable(IMAGES)).all()
        assert torch.equal(fresh(IMAGES), candidate.module(IMAGES))


def test_the_same_step_gives_the_same_bits() -> None:
    module = seeded(Deep)
    hashes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        hashes.add(state_hash(pruned(module, LABELLED, criterion="loss", amount=0.5).module))
    assert len(hashes) == 1


def test_recipes_know_it() -> None:
    text = "steps:\n  - prune.depth: {amount: 0.25, criterion: loss, exclude: [blocks.0]}\n"
    recipe = parse_recipe(text)
    assert recipe.steps == (DepthStep(amount=0.25, criterion="loss", exclude=("blocks.0",)),)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    named = parse_recipe("steps:\n  - prune.depth: {blocks: [blocks.1]}\n")
    assert parse_recipe(dump_recipe(named)) == named


@pytest.mark.parametrize("wrong", [{"amount": 1.0}, {"criterion": "x"}, {"blocks": []}, {"samples": 0}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        DepthStep(**wrong)


def test_the_task_may_be_unlabelled() -> None:
    module = seeded(Deep)
    context = context_for(module, Task(calibrate=IMAGES).splits["calibrate"])
    assert len(gone(DepthStep().apply(Candidate(frozen_copy(module)), context))) == 1
