from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.split import Split
from tersor.errors import ConfigError, DataError
from tersor.prune import (
    Gradual,
    LotteryTicket,
    Rounds,
    Sparsity,
    SparsitySchedule,
    Training,
    Unstructured,
    gradual,
    lottery_ticket,
)
from tersor.prune.masks import check, sparsity_of
from tersor.train import Schedule
from tersor.train.checkpoint import Keeper
from zoo import CNN_DATA, Cnn, Mlp, context_for, integers, normal, seeded, state_hash

X, Y = normal(97, 12), integers(4, 97)
SHORT = Schedule(epochs=3, batch_size=16, lr=0.1, momentum=0.9)


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return functional.cross_entropy(module(*batch.args), batch.labels)


def training(**fields: Any) -> Training:
    return replace(Training(Split("train", (X, Y)), cross_entropy, SHORT), **fields)


def labelled(**fields: Any) -> Context:
    return context_for(seeded(Cnn), None, train=(CNN_DATA, integers(5, 48)), **fields)


@pytest.mark.parametrize(("examples", "batch_size"), [(97, 16), (96, 16), (97, 1), (3, 16), (1, 16), (17, 16)])
def test_steps_are_counted_as_training_counts_them(examples: int, batch_size: int) -> None:
    told: list[tuple[Any, ...]] = []
    schedule = Schedule(epochs=2, batch_size=batch_size, lr=1e-6)
    plan = training(split=Split("train", (X[:examples], Y[:examples])), schedule=schedule)
    replace(plan, progress=lambda *what: told.append(what)).run(seeded(Mlp), lambda: None)
    assert told[-1][:2] == (plan.steps, plan.steps)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("curve", ["cubic", "iterative", "one_shot"])
def test_sparsity_grows_while_training_and_nothing_comes_back(curve: Any, optimizer: Any) -> None:
    module = seeded(Mlp)
    seen: list[float] = []
    gone: list[set[tuple[str, int]]] = []

    def watched(module: nn.Module, batch: Batch) -> Tensor:
        weights = {path: weight for path, weight in module.named_parameters() if weight.ndim == 2}
        zeros = {(path, int(i)) for path, weight in weights.items() for i in (weight.flatten() == 0).nonzero()}
        gone.append(zeros)
        seen.append(len(zeros) / sum(weight.numel() for weight in weights.values()))
        return cross_entropy(module, batch)

    schedule = SHORT.model_copy(update={"optimizer": optimizer})
    over = SparsitySchedule(curve=curve, begin=0.2, end=0.6, frequency=2, rounds=3)
    grown = gradual(module, training(loss=watched, schedule=schedule), Sparsity(amount=0.8), over=over)
    steps = training().steps
    plan = over.plan(0.8, steps)
    for step, share in enumerate(seen):
        reached = [amount for moment, amount in plan.items() if moment <= step]
        assert share == pytest.approx(reached[-1] if reached else 0.0, abs=0.002)
    assert all(early <= late for early, late in pairwise(gone))
    check(module, grown.masks)
    assert sparsity_of(grown.masks) == pytest.approx(0.8, abs=0.001)
    assert len(grown.trace) == 3
    assert not module.training


def test_growing_slowly_learns_better_than_cutting_at_the_end() -> None:
    def accuracy(over: SparsitySchedule) -> float:
        module = seeded(Mlp)
        long = Schedule(epochs=40, batch_size=16, lr=0.1, weight_decay=0.0)
        gradual(module, training(schedule=long), Sparsity(amount=0.8), over=over)
        with torch.no_grad():
            return float((module(X).argmax(1) == Y).double().mean())

    assert accuracy(SparsitySchedule()) > accuracy(SparsitySchedule(curve="one_shot", begin=1.0, end=1.0)) + 0.1


def test_the_step_trains_a_copy_and_is_deterministic(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn)
    before = noticed(module)
    step = Gradual(sparsity=0.7, schedule=Schedule(epochs=2, batch_size=8), over=SparsitySchedule(frequency=3))
    done, again = (step.apply(Candidate(module), labelled()) for _ in range(2))
    assert noticed(module) == before
    assert state_hash(done.module) == state_hash(again.module)
    assert sparsity_of(done.masks) == pytest.approx(0.7, abs=0.001)
    check(done.module, done.masks)
    notes = done.history[-1].notes
    assert notes[0].startswith("70.0% of")
    assert any("no speed-up expected on this runtime" in note for note in notes)
    assert step.needs == {"train"}


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_measured_criteria_look_again_at_every_update(criterion: str) -> None:
    step = Gradual(
        sparsity=0.5,
        criterion=criterion,
        schedule=Schedule(epochs=1, batch_size=16),
        over=SparsitySchedule(frequency=1),
    )
    assert step.needs == {"train", "calibrate"}
    assert sparsity_of(step.apply(Candidate(seeded(Cnn)), labelled()).masks) == pytest.approx(0.5, abs=0.001)


def test_it_goes_on_from_what_an_earlier_step_removed() -> None:
    first = Unstructured(sparsity=0.3).apply(Candidate(seeded(Cnn)), labelled())
    for step in (
        Gradual(sparsity=0.6, schedule=Schedule(batch_size=8)),
        LotteryTicket(sparsity=0.6, schedule=Schedule(batch_size=8), repeat=Rounds(rounds=2)),
    ):
        done = step.apply(first, labelled())
        assert sparsity_of(done.masks) == pytest.approx(0.6, abs=0.001)
        assert not any(bool((done.masks[path] & ~mask).any()) for path, mask in first.masks.items())


def test_without_labels_it_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"prune\.gradual trains with the task's loss, but .* no labels"):
        Gradual(sparsity=0.5).apply(Candidate(seeded(Cnn)), context_for(seeded(Cnn), None, train=CNN_DATA))


@pytest.mark.parametrize("step", [Gradual, LotteryTicket])
@pytest.mark.parametrize("settings", [{"pattern": "2:4"}, {"allocation": {"*": 0.5}}])
def test_what_cannot_grow_is_refused(step: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sparsity can only grow where one amount decides"):
        step(sparsity=0.5, **settings)
    with pytest.raises(ConfigError, match="leave reconstruct to"):
        gradual(seeded(Mlp), training(), Sparsity(amount=0.5, reconstruct="obc"))


def test_averaged_weights_are_refused_while_masks_grow() -> None:
    with pytest.raises(ConfigError, match="leave ema out"):
        gradual(seeded(Mlp), training(schedule=Schedule(ema=0.9)), Sparsity(amount=0.5))


class Watch:
    """The weights at the start of every training, as the loss first sees them."""

    def __init__(self, steps: int) -> None:
        self.steps, self.count, self.starts, self.all = steps, 0, [], []

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        weights = {path: weight.detach().clone() for path, weight in module.named_parameters()}
        self.all.append(weights)
        if self.count % self.steps == 0:
            self.starts.append(weights)
        self.count += 1
        return cross_entropy(module, batch)


@pytest.mark.parametrize("rewind_step", [0, 5, None])
def test_survivors_are_set_back(rewind_step: int | None) -> None:
    watch = Watch(training().steps)
    module = seeded(Mlp)
    rounds = Rounds(rounds=3, rewind_step=rewind_step)
    grown = lottery_ticket(module, training(loss=watch), Sparsity(amount=0.657, floor=0.0), rounds=rounds)
    check(module, grown.masks)
    assert sparsity_of(grown.masks) == pytest.approx(0.657, abs=0.001)
    pruned = watch.starts if rewind_step is None else watch.starts[1:]
    assert len(pruned) == 3
    assert len(grown.trace) == 3 * len(watch.starts)
    shares = []
    for start in pruned:
        zeros = sum(int((start[path] == 0).sum()) for path in grown.masks)
        shares.append(zeros / sum(mask.numel() for mask in grown.masks.values()))
        if rewind_step is not None:
            early = watch.all[rewind_step]
            for path, weight in start.items():
                survives = weight != 0 if path in grown.masks else torch.ones_like(weight, dtype=torch.bool)
                assert torch.equal(weight[survives], early[path][survives])
    assert shares == pytest.approx([0.3, 0.51, 0.657], abs=0.002)
    if rewind_step is None:
        assert not torch.equal(pruned[1]["first.bias"], pruned[0]["first.bias"])


def test_a_ticket_is_drawn_from_trained_weights_not_from_the_rewound_ones() -> None:
    module = seeded(Mlp)
    grown = lottery_ticket(module, training(), Sparsity(amount=0.5), rounds=Rounds(rounds=1))
    by_start = gradual(
        seeded(Mlp), training(), Sparsity(amount=0.5), over=SparsitySchedule(curve="one_shot", begin=0.0)
    )
    assert any(not torch.equal(grown.masks[path], mask) for path, mask in by_start.masks.items())


def test_rewinding_past_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewind_step: training takes 18 steps only, got 19"):
        lottery_ticket(seeded(Mlp), training(), Sparsity(amount=0.5), rounds=Rounds(rewind_step=19))


def test_the_ticket_step_is_deterministic() -> None:
    step = LotteryTicket(sparsity=0.5, schedule=Schedule(batch_size=16), repeat=Rounds(rounds=2, rewind_step=1))
    done, again = (step.apply(Candidate(seeded(Cnn)), labelled()) for _ in range(2))
    assert state_hash(done.module) == state_hash(again.module)
    assert done.history[-1].name == "prune.lottery_ticket"


class Interrupted(Exception):
    """Stands for a kill between two steps."""


def interrupted_at(step: int, context: Context) -> Context:
    def progress(label: str, done: int, total: int, facts: Any = None) -> None:
        if done == step:
            raise Interrupted

    return replace(context, progress=progress)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_an_interrupted_training_goes_on_with_its_masks(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "due", lambda self, step: True)
    plan = Gradual(sparsity=0.8, schedule=SHORT, criterion="l1")
    whole = plan.apply(Candidate(seeded(Cnn)), labelled())
    kept = replace(labelled(), directory=tmp_path)
    with pytest.raises(Interrupted):
        plan.apply(Candidate(seeded(Cnn)), interrupted_at(step, kept))
    told: list[int] = []
    watched = replace(kept, progress=lambda label, done, total, facts=None: told.append(done))
    done = plan.apply(Candidate(seeded(Cnn)), watched)
    assert told == list(range(step, 10))
    assert state_hash(done.module) == state_hash(whole.module)
    assert all(torch.equal(mask, whole.masks[path]) for path, mask in done.masks.items())
