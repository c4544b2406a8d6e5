from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.core.search import Choice
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.graph import apply_surgery, plan_surgery
from tersor.prune import choose_units, depth
from tersor.search.damage import DamageTable, measure_damage
from tersor.search.discover import discover
from tersor.search.space import BLOCK, Group, Space
from zoo import integers, normal, seeded, state_hash


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(8, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.narrow(functional.relu(self.norm(self.wide(image))))


class Residual(nn.Module):
    """Three blocks on images `[B, 3, 6, 6]`."""

    def __init__(self, *, wrapped: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.head = nn.Linear(8, 4)
        self.wrapped = wrapped

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        scores = self.head(self.blocks(functional.relu(self.stem(image))).mean((2, 3)))
        return {"scores": scores} if self.wrapped else scores


def built(**fields: bool) -> nn.Module:
    return seeded(lambda: Residual(**fields))


IMAGES, LABELS = normal(24, 3, 6, 6), integers(4, 24, seed=1)
BATCHES = [Batch((IMAGES[i : i + 8],), {}, LABELS[i : i + 8]) for i in (0, 8, 16)]
FLOATS = [Batch(batch.args, {}, None) for batch in BATCHES]
CROSS_ENTROPY = functional.cross_entropy


@pytest.fixture(scope="module")
def space() -> Space:
    return discover(built(), Task(search=(IMAGES, LABELS)))


def divergence(expected: Tensor, actual: Tensor) -> float:
    old, new = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((old.exp() * (old - new)).sum(-1).mean())


def mean_square(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).double().square().sum() / expected.double().square().sum())


def loss_rise(expected: Tensor, actual: Tensor) -> float:
    return float(CROSS_ENTROPY(actual.double(), LABELS) - CROSS_ENTROPY(expected.double(), LABELS))


def cut(model: nn.Module, name: str, kept: int, size: int) -> nn.Module:
    share = {name.replace("[", "[[]"): 1 - kept / size}
    chosen = choose_units(model, IMAGES[:2], criterion="l2", allocation=share, floor=0.0, verify="off")
    return apply_surgery(copy.deepcopy(model), plan_surgery(model, chosen.coupling, chosen.units))


def without(model: nn.Module, *blocks: str) -> nn.Module:
    return depth(model, IMAGES[:2], blocks=blocks, verify=False).model


def test_damages_are_those_of_models_that_are_really_cut(space: Space) -> None:
    model = built()
    tables = [
        (expected, measure_damage(model, space, BATCHES, measure=measure, loss=CROSS_ENTROPY, pairs=0))
        for measure, expected in (("divergence", divergence), ("mse", mean_square), ("loss", loss_rise))
    ]
    assert {group.kind for group in space.groups} >= {BLOCK, "channel"}
    with torch.no_grad():
        whole = model(IMAGES)
        for group in space.groups:
            for option in group.options[1:]:
                block = group.kind == BLOCK
                smaller = without(model, group.name) if block else cut(model, group.name, option, group.options[0])
                actual = smaller(IMAGES)
                for expected, table in tables:
                    assert table.damages[group.name][option] == pytest.approx(expected(whole, actual), abs=1e-6)
    for (_, table), measure in zip(tables, ("divergence", "mse", "loss"), strict=True):
        assert table.measure == measure
        assert {group.name for group in space.groups} == set(table.damages)
        assert all(table.damages[group.name][group.options[0]] == 0 for group in space.groups)


def test_pairs_are_what_two_decisions_do_beyond_their_sum(space: Space) -> None:
    model = built()
    table = measure_damage(model, space, BATCHES, pairs=3)
    blocks = [group.name for group in space.groups if group.kind == BLOCK]
    adjacent, mixed = set(itertools.pairwise(blocks)), [pair for pair in table.pairs if pair[1] not in blocks]
    assert len(table.pairs) == 3
    assert adjacent <= set(table.pairs)
    assert len(mixed) == 1
    for one, other in adjacent:
        with torch.no_grad():
            changed = without(model, one, other)(IMAGES)
            joint = divergence(model(IMAGES), changed)
        assert table.predict(space, Choice(skipped=(one, other))) == pytest.approx(joint, abs=1e-5)
    block, family = mixed[0]
    least = space.by_name[family].options[-1]
    with torch.no_grad():
        smaller = without(cut(model, family, least, space.by_name[family].options[0]), block)
        joint = divergence(model(IMAGES), smaller(IMAGES))
    assert table.predict(space, Choice(skipped=(block,), widths={family: least})) == pytest.approx(joint, abs=1e-5)


def test_pairs_follow_the_seed_and_never_exceed_what_there_is(space: Space) -> None:
    def pairs(count: int, seed: int) -> list[tuple[str, str]]:
        return list(measure_damage(built(), space, BATCHES[:1], pairs=count, seed=seed).pairs)

    assert pairs(4, 0) == pairs(4, 0)
    assert pairs(4, 0) != pairs(4, 1)
    everything = pairs(1000, 0)
    assert len(everything) == len(space.groups) - 1  # a tree
    names = {group.name for group in space.groups[:1]}
    for _ in everything:
        names |= {name for pair in everything if names & set(pair) for name in pair}
    assert names == set(space.by_name)
    inside = {(group.inside, group.name) for group in space.groups if group.inside}
    assert not inside & set(everything)


def test_the_model_stays_as_it_is_whatever_happens(space: Space) -> None:
    model = built().train()
    before = state_hash(model)
    told: list[tuple[int, int]] = []

    def interrupt(label: str, done: int, total: int, *_: object) -> None:
        assert label == "damage"
        told.append((done, total))
        if len(told) == 5:
            raise KeyboardInterrupt

    measure_damage(model, space, BATCHES, pairs=2, progress=lambda label, done, total, *_: told.append((done, total)))
    steps = sum(len(group.options) - 1 for group in space.groups) + 2
    assert told == [(number, steps) for number in range(1, steps + 1)]
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        measure_damage(model, space, BATCHES, progress=interrupt)
    assert state_hash(model) == before
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_without_labels_that_are_classes_outputs_are_compared(space: Space) -> None:
    assert measure_damage(built(), space, FLOATS, pairs=0).measure == "mse"
    wrong = [Batch(batch.args, {}, normal(8, 4)) for batch in BATCHES]
    assert measure_damage(built(), space, wrong, pairs=0).measure == "mse"
    assert measure_damage(built(), space, FLOATS, pairs=0, measure="divergence").measure == "divergence"
    assert measure_damage(built(), space, BATCHES, pairs=0).measure == "divergence"


def test_the_declared_output_counts_and_criteria_may_be_measured() -> None:
    model = built(wrapped=True)
    space = discover(model, Task(search=(IMAGES, LABELS), output="scores"))
    one = measure_damage(model, space, BATCHES, output="scores", pairs=0)
    assert one.damages == measure_damage(built(), space, BATCHES, pairs=0).damages
    other = measure_damage(model, space, BATCHES, output="scores", pairs=0, criterion="taylor", loss=CROSS_ENTROPY)
    blocks = [group.name for group in space.groups if group.kind == BLOCK]
    assert {name: other.damages[name] for name in blocks} == {name: one.damages[name] for name in blocks}
    assert other.damages != one.damages


def test_a_damage_that_is_no_number_is_an_error(space: Space) -> None:
    model = built()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="output has NaN"):
        measure_damage(model, space, BATCHES)

    def infinite_when_changed(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return outputs.sum() * (1.0 if len(calls) <= len(BATCHES) else math.inf)

    calls: list[int] = []
    with pytest.raises(NonFiniteError, match=r"damage of \{'blocks\.0': 0\}"):
        measure_damage(built(), space, BATCHES, measure="loss", loss=infinite_when_changed)


def test_what_cannot_be_measured_is_refused(space: Space) -> None:
    with pytest.raises(DataError, match="no batches"):
        measure_damage(built(), space, [])
    with pytest.raises(ConfigError, match="needs loss"):
        measure_damage(built(), space, BATCHES, measure="loss")
    with pytest.raises(DataError, match="labels in every batch"):
        measure_damage(built(), space, FLOATS, measure="loss", loss=CROSS_ENTROPY)
    with pytest.raises(ConfigError, match="pairs"):
        measure_damage(built(), space, BATCHES, pairs=-1)
    with pytest.raises(ConfigError, match="pass loss"):
        measure_damage(built(), space, BATCHES, criterion="taylor")
    other = Space((*space.groups[:-1], Group(space.groups[-1].name, "channel", (99, 5))), space.weights)
    with pytest.raises(ConfigError, match="discover the space of this model"):
        measure_damage(built(), other, BATCHES)
    numbers = Space((), ())
    single = nn.Sequential(nn.Flatten(), nn.Linear(108, 1))
    with pytest.raises(ConfigError, match="scores of classes"):
        measure_damage(single, numbers, BATCHES, measure="divergence")


def test_a_sum_of_decisions_is_predicted_and_recorded() -> None:
    block, inner = Group("b", BLOCK, (1, 0)), Group("f", "channel", (16, 8, 4), "b")
    outer = Group("s", "width", (8, 4))
    space = Space((block, inner, outer), ())
    table = DamageTable(
        "mse", {"b": {0: 1.0}, "f": {8: 0.25, 4: 0.5}, "s": {4: 2.0}}, {("f", "s"): 0.3, ("b", "s"): -0.5}
    )
    assert table.strength(inner, 16) == 0
    assert table.strength(inner, 8) == pytest.approx(1 / 2)
    assert table.strength(inner, 4) == table.strength(block, 0) == 1
    harmless = DamageTable("loss", {"f": {8: 0.1, 4: -0.1}, "g": {8: 0.9, 6: -0.3, 4: 0.6}})
    assert harmless.strength(inner, 8) == pytest.approx(2 / 3)
    uneven = Group("g", "channel", (16, 8, 6, 4))
    assert [harmless.strength(uneven, option) for option in uneven.options] == [0, 1, 0, 1]
    assert table.predict(space, Choice()) == 0
    assert table.predict(space, Choice(widths={"f": 8, "s": 4})) == pytest.approx(0.25 + 2 + 0.3 / 2)
    assert table.predict(space, Choice(skipped=("b",), widths={"f": 4, "s": 4})) == pytest.approx(1 + 2 - 0.5)
    with pytest.raises(ConfigError, match="nothing was measured of 'f' with 5 of 16"):
        table.predict(space, Choice(widths={"f": 5}))
    record = table.record(space)
    assert record.measure == "mse"
    assert [(row.name, row.kind, row.options, row.damages) for row in record.rows] == [
        ("b", "block", [1, 0], [0.0, 1.0]),
        ("f", "channel", [16, 8, 4], [0.0, 0.25, 0.5]),
        ("s", "width", [8, 4], [0.0, 2.0]),
    ]
    assert record.pairs == [("f", "s", 0.3), ("b", "s", -0.5)]
