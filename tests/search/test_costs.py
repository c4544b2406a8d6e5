"""Cost tables: known machines are found again, less is never slower, forecasts are told apart from fits."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.context import Context
from tersor.core.search import Choice
from tersor.errors import ConfigError
from tersor.measure import mac_counts
from tersor.search.costs import CostTable, Point, design
from tersor.search.discover import discover
from tersor.search.moves import steps_of
from tersor.search.space import Group, Space, Weight
from zoo import context_for, exported, normal, seeded

FORMATS = ("float32", "int8")


def made_space() -> Space:
    """A stem, four blocks of one kind and three of another, a head; hidden channels in each block, one shared width."""
    groups, weights = [], [Weight("stem.weight", "stem", 40_000, 4096, 432, rows=(("width", 1.0),))]
    for index in range(7):
        block, size = f"blocks.{index}", 1 if index < 4 else 2
        hidden, kind = f"{block}.hidden", "narrow" if size == 1 else "wide"
        inner, outer = (
            {"rows": ((hidden, 1.0),), "columns": (("width", 1.0),)},
            {"rows": (("width", 1.0),), "columns": ((hidden, 1.0),)},
        )
        for name, sides in (("first", inner), ("second", outer)):
            macs, outputs = 300_000 * size * (1 if name == "first" else 2), 2048 * size
            weights.append(Weight(f"{block}.{name}.weight", f"{kind} {name}", macs, outputs, 9 * size, block, **sides))
        groups += [Group(block, "block", (1, 0)), Group(hidden, "channel", (32, 24, 16, 8), block)]
    groups.append(Group("width", "width", (16, 12, 8)))
    weights.append(Weight("head.weight", "head", 10_000, 10, 160, columns=(("width", 1.0),)))
    groups.sort(key=lambda group: group.kind != "block")
    return Space(tuple(groups), tuple(weights), FORMATS)


SPACE = made_space()


def machine(space: Space, *, noise: float = 0.0, seed: int = 0) -> Callable[[Choice], Point]:
    """Costs that are linear in what the table looks at, different for every kind of weight."""
    generator = np.random.default_rng(seed)
    kinds = list(dict.fromkeys(weight.kind for weight in space.weights))
    costs = {kind: generator.uniform((0.01, 1e-7, 1e-6), (0.05, 1e-6, 1e-5)) for kind in kinds}

    def measure(choice: Choice) -> Point:
        options, ms, entries = space.options(choice), 0.2, space.entries(choice)
        for weight in space.weights:
            rows, columns = space.shares(weight, options)
            if weight.block not in choice.skipped:
                ms += float(costs[weight.kind] @ (1, weight.macs * rows * columns, weight.outputs * rows))
        ms *= 1 + noise * generator.standard_normal()
        return Point(choice, ms, round(1000 + 4 * entries), round(space.macs(choice)), round(50_000 + 8 * entries))

    return measure


def fitted(space: Space = SPACE, *, noise: float = 0.0, points: int = 24) -> CostTable:
    measure = machine(space, noise=noise)
    return CostTable.fit(space, "float32", [measure(choice) for choice in design(space, "float32", points=points)])


def others(space: Space, table: CostTable, count: int = 40) -> list[Choice]:
    """Choices that the table was not fitted on."""
    known = {point.choice.key for point in table.points}
    return [item for item in design(space, "float32", points=count, seed=77) if item.key not in known]


def drawn(data: st.DataObject, space: Space) -> dict[str, int]:
    return {group.name: data.draw(st.sampled_from(group.options), group.name) for group in space.groups}


# --- fitting


def test_a_linear_machine_is_found_again() -> None:
    table, truth = fitted(), machine(SPACE)
    errors = [table.predict_ms(choice) / truth(choice).latency_ms - 1 for choice in others(SPACE, table)]
    assert len(errors) > 20
    assert np.abs(errors).max() < 0.01


def test_a_noisy_machine_is_found_within_its_noise() -> None:
    table, truth = fitted(noise=0.03), machine(SPACE)
    errors = [table.predict_ms(choice) / truth(choice).latency_ms - 1 for choice in others(SPACE, table)]
    assert np.median(np.abs(errors)) < 0.03


def test_few_points_leave_no_layer_without_costs() -> None:
    table = fitted(points=4)
    layers = table.record().layers
    assert list(layers) == [weight.path for weight in SPACE.weights]
    assert min(layers.values()) > 0
    whole = Choice()
    assert table.constant_ms + sum(layers.values()) == pytest.approx(table.predict_ms(whole))
    assert table.predict_ms(whole) == pytest.approx(machine(SPACE)(whole).latency_ms, rel=0.02)


TABLES = [fitted(noise=noise, points=points) for noise, points in ((0.0, 24), (0.1, 24), (0.5, 5))]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(TABLES))
def test_less_is_never_predicted_slower(data: st.DataObject, table: CostTable) -> None:
    options = drawn(data, SPACE)
    group = data.draw(st.sampled_from(SPACE.groups))
    fewer = options | {group.name: data.draw(st.sampled_from([o for o in group.options if o <= options[group.name]]))}
    more, less = (SPACE.choice(each) for each in (options, fewer))
    for predict in (table.predict_ms, table.predict_bytes, table.predict_memory, table.predict_energy):
        large, small = predict(more), predict(less)
        assert large is not None
        assert small is not None
        assert 0 <= small <= large * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_model_costs_what_its_weights_cost(data: st.DataObject) -> None:
    table, options = TABLES[1], drawn(data, SPACE)
    parts = [table.weight_ms(weight, *SPACE.shares(weight, options)) for weight in SPACE.weights]
    assert table.predict_ms(SPACE.choice(options)) == pytest.approx(table.constant_ms + sum(parts))
    skipped = [part for part, weight in zip(parts, SPACE.weights, strict=True) if options.get(weight.block or "") == 0]
    assert not any(skipped)


def test_bytes_and_memory() -> None:
    table, truth = fitted(), machine(SPACE)
    for choice in others(SPACE, table):
        point = truth(choice)
        assert table.predict_bytes(choice) == pytest.approx(point.size_bytes, rel=0.01)
        assert table.predict_memory(choice) == pytest.approx(point.peak_memory_bytes, rel=0.01)
    blind = [replace(point, peak_memory_bytes=99 if at < 2 else None) for at, point in enumerate(table.points)]
    assert CostTable.fit(SPACE, "float32", blind).predict_memory(Choice()) is None


def test_energy_is_computing_and_reading() -> None:
    whole = Choice()
    table = fitted()
    macs, size = SPACE.macs(whole), table.predict_bytes(whole)
    assert table.predict_energy(whole) == pytest.approx((macs * 4.6 + size * 160) * 1e-9)
    points = [Point(p.choice.model_copy(update={"format": "int8"}), 1.0, p.size_bytes, 1) for p in table.points]
    integers = CostTable.fit(SPACE, "int8", points)
    assert integers.predict_energy(Choice(format="int8")) == pytest.approx((macs * 0.23 + size * 160) * 1e-9)


# --- forecasts


def test_forecasts_are_kept_as_they_were() -> None:
    table, truth = fitted(points=6), machine(SPACE, seed=5)  # another machine: the table is wrong about it
    new = [truth(choice) for choice in others(SPACE, table)[:10]]
    said = [table.predict_ms(point.choice) for point in new]
    wider = table.with_points(new[:4]).with_points(new[4:])
    record = wider.record()
    assert [point.fitted for point in record.points] == [True] * 6 + [False] * 10
    assert [point.predicted_ms for point in record.points[6:10]] == said[:4]
    assert record.points[10].predicted_ms != said[4]  # the first four had corrected the table before
    honest = record.error(fitted=False)
    assert honest is not None
    assert honest > 0.05
    now = [abs(wider.predict_ms(point.choice) / point.latency_ms - 1) for point in new]
    assert np.median(now) < honest
    assert len(table.points) == 6  # the first table stays


def test_what_is_measured_again_is_no_forecast() -> None:
    table = fitted(points=6)
    again = table.with_points([table.points[2]])
    assert [point.fitted for point in again.record().points] == [True] * 7
    assert again.record().error(fitted=False) is None


def test_nothing_more_changes_nothing() -> None:
    table = fitted(points=6)
    assert table.with_points([]) == table


# --- the design


def test_the_design_repeats_blocks_shrinks_families_and_mixes() -> None:
    choices = design(SPACE, "int8", points=24)
    assert len(choices) == len({choice.key for choice in choices}) == 24
    assert choices == design(SPACE, "int8", points=24)
    assert choices != design(SPACE, "int8", points=24, seed=1)
    assert choices[:10] == design(SPACE, "int8", points=10)
    assert {choice.format for choice in choices} == {"int8"}
    narrow, wide = ([f"blocks.{i}" for i in part] for part in (range(4), range(4, 7)))
    assert not choices[0].skipped
    assert not choices[0].widths
    smallest = [choice.widths for choice in choices if not choice.skipped]
    assert {f"blocks.{i}.hidden": 8 for i in range(7)} in smallest
    assert {"width": 8} in smallest
    alone = [set(choice.skipped) for choice in choices if choice.skipped and not choice.widths]
    assert all(set(part) - {part[0]} in alone for part in (narrow, wide))  # all but one
    assert {"blocks.1", "blocks.3"} in alone  # half of four
    assert {"blocks.5"} in alone
    assert any(choice.skipped and choice.widths for choice in choices)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), points=st.integers(3, 60))
def test_some_block_always_stays(seed: int, points: int) -> None:
    choices = design(SPACE, "float32", points=points, seed=seed)
    assert len(choices) == points
    assert max(len(choice.skipped) for choice in choices) < 7


def test_small_spaces_have_few_designs() -> None:
    weight = Weight("a.weight", "a", 10, 10, 10, rows=(("f", 1.0),))
    space = Space((Group("f", "channel", (8, 4)),), (weight,))
    assert [choice.widths for choice in design(space, "float32")] == [{}, {"f": 4}]
    blocks = Space((Group("a", "block", (1, 0)),), (Weight("a.weight", "a", 10, 10, 10, "a"),))
    assert design(blocks, "float32") == [Choice()]  # the only block stays


# --- real models


class Block(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Residual(nn.Module):
    """Three blocks, a convolution of stride 2, three more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.fine = nn.ModuleList(Block(16, 16) for _ in range(3))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(Block(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.fine:
            x = block(x)
        x = torch.relu(self.down(x))
        for block in self.coarse:
            x = block(x)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Zoo:
    """A space, the choices that a table is fitted on, others, and the models that all of them make."""

    context: Context
    space: Space
    fitted: list[Choice]
    held_out: list[Choice]
    models: dict[str, nn.Module]


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    model = seeded(Residual)
    context = context_for(model, normal(4, 3, 32, 32))
    space = discover(model, context.task)
    fitted = design(space, "float32", points=11)
    known = {choice.key for choice in fitted}
    held_out = [choice for choice in design(space, "float32", points=30, seed=77) if choice.key not in known][:4]
    models = {}
    for choice in [*fitted, *held_out]:
        candidate = Candidate(frozen_copy(model))
        for step in steps_of(choice, space):
            candidate = step.apply(candidate, context)
        models[choice.key] = candidate.module
    return Zoo(context, space, fitted, held_out, models)


def test_real_models_are_predicted_by_their_layers(zoo: Zoo) -> None:
    """A machine that takes what the layers of the real, cut models compute."""
    assert sum(group.kind == "block" for group in zoo.space.groups) == 6
    assert {group.kind for group in zoo.space.groups} > {"block"}

    def measure(choice: Choice) -> Point:
        model = zoo.models[choice.key]
        macs = mac_counts(model, zoo.context.task.example(1))
        leaves = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        size = sum(parameter.numel() for parameter in model.parameters())
        return Point(choice, 0.05 + sum(0.01 + 2e-7 * macs[path] for path in leaves), 4 * size, macs[""])

    table = CostTable.fit(zoo.space, "float32", [measure(choice) for choice in zoo.fitted])
    points = [measure(choice) for choice in zoo.held_out]
    errors = [abs(table.predict_ms(point.choice) / point.latency_ms - 1) for point in points]
    assert len(errors) == 4
    assert np.median(errors) < 0.05
    assert max(errors) < 0.15
    times = [point.latency_ms for point in points]
    assert max(times) > 1.3 * min(times)  # there is something to predict
    for point in points:
        assert zoo.space.macs(point.choice) == pytest.approx(point.macs, rel=0.05)


@pytest.mark.slow
def test_real_times_are_predicted(zoo: Zoo, tmp_path: Path) -> None:
    """ONNX Runtime, in turns; the bound is wide, because others use the machine."""
    sessions, times = {}, defaultdict(list)
    for key, model in zoo.models.items():
        (tmp_path / key).mkdir()
        sessions[key] = exported(Candidate(model), zoo.context, tmp_path / key)()
    image = normal(1, 3, 32, 32).numpy()
    for _ in range(12):
        for key, session in sessions.items():
            for call in range(8):
                started = time.perf_counter()
                session(image)
                if call >= 2:
                    times[key].append((time.perf_counter() - started) * 1e3)
    measured = {choice.key: float(np.median(times[choice.key])) for choice in (*zoo.fitted, *zoo.held_out)}
    table = CostTable.fit(zoo.space, "float32", [Point(item, measured[item.key], 1, 1) for item in zoo.fitted])
    errors = [abs(table.predict_ms(choice) / measured[choice.key] - 1) for choice in zoo.held_out]
    assert np.median(errors) < 0.25


# --- bad input


def test_bad_points_are_refused() -> None:
    points = [machine(SPACE)(choice) for choice in design(SPACE, "float32", points=5)]
    with pytest.raises(ConfigError, match="at least 3 measured models, got 2"):
        CostTable.fit(SPACE, "float32", points[:2])
    with pytest.raises(ConfigError, match="it is about int8, got a choice in float32"):
        CostTable.fit(SPACE, "int8", points)
    table = CostTable.fit(SPACE, "float32", points)
    stranger = Choice(skipped=("layer9",))
    with pytest.raises(ConfigError, match="layer9"):
        table.with_points([Point(stranger, 1.0, 1, 1)])
    for predict in (table.predict_ms, table.predict_bytes, table.predict_memory, table.predict_energy):
        with pytest.raises(ConfigError, match="layer9"):
            predict(stranger)
        with pytest.raises(ConfigError, match="int8"):
            predict(Choice(format="int8"))
    with pytest.raises(ConfigError, match="at least 3 whole models to measure, got 2"):
        design(SPACE, "float32", points=2)
    with pytest.raises(ConfigError, match="float16"):
        design(SPACE, "float16")


@pytest.mark.parametrize("latency", [0.0, -1.0, math.nan, math.inf])
def test_impossible_latencies_are_refused(latency: float) -> None:
    with pytest.raises(ConfigError, match=r"Point\.latency_ms"):
        Point(Choice(), latency, 1, 1)


@pytest.mark.parametrize("numbers", [(0, 1, None), (1, -1, None), (1, 1, -1)])
def test_impossible_sizes_are_refused(numbers: tuple[int, int, int | None]) -> None:
    with pytest.raises(ConfigError, match="Point"):
        Point(Choice(), 1.0, *numbers)
