"""Widths that a step chooses: within its limit, and until the metric is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.recipe import Recipe
from tersor.core.report import StepRecord
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError
from tersor.quantize import Fallback, Mixed, Static
from tersor.quantize.fallback import fewest
from tersor.recipes import dump_recipe, parse_recipe
from zoo import CNN_DATA, Cnn, context_for, normal, seeded


def bits_of(candidate: Candidate) -> dict[str, int]:
    assert candidate.plan is not None
    return {quant.module: quant.scheme.bits for quant in candidate.plan.weights.values()}


def context_of(problem: Any, **splits: Any) -> Context:
    """The trained network with 100 images to calibrate, 400 to search."""
    images, labels = problem.images()
    given = {"calibrate": (images[:100], labels[:100]), "search": (images[1600:], labels[1600:])} | splits
    return Context(Task(**given), Target(threads=1, reduce_range=False), problem.model())


def accuracy(module: nn.Module, problem: Any) -> float:
    images, labels = problem.splits()["report"]
    with torch.no_grad():
        return float((module(images).argmax(1) == labels).double().mean())


# --- mixed


def test_widths_keep_within_the_average_and_the_record_tells_them(noticed: Callable[[nn.Module], str]) -> None:
    module = seeded(Cnn)
    context, before = context_for(module, CNN_DATA), noticed(module)
    done = Mixed(average_bits=4.5, edges="choose").apply(Candidate(module), context)
    assert noticed(module) == before
    widths = bits_of(done)
    sizes = {path: module.get_submodule(path).get_parameter("weight").numel() for path in widths}
    average = sum(widths[path] * size for path, size in sizes.items()) / sum(sizes.values())
    assert 3.5 < average <= 4.5
    (record,) = done.history
    assert (record.name, record.quantization is not None) == ("quantize.mixed", True)
    assert record.settings["average_bits"] == 4.5
    assert record.settings["overrides"] == {}  # what the user set, not what was found
    assert record.quantization is not None
    assert record.quantization.average_bits == pytest.approx(average)
    assert {layer.name: layer.weight_bits for layer in record.quantization.layers} == widths
    assert record.quantization.widths == [2, 3, 4, 5, 6, 8]
    assert all(len(layer.losses) == 6 and layer.activation_bits == 8 for layer in record.quantization.layers)
    assert record.notes[0].startswith(f"{average:.2f} bits per weight on average, KL divergence of single layers adds")
    assert record.notes[1].startswith("widths, most sensitive layer first: ")
    assert "ranges by mse on 48 examples" in record.notes[2]
    assert StepRecord.model_validate_json(record.model_dump_json()) == record


def test_edges_and_overrides_are_fixed_and_count() -> None:
    module = seeded(Cnn)
    done = Mixed(average_bits=6.5, overrides={"block.*": 3}).apply(Candidate(module), context_for(module, CNN_DATA))
    assert bits_of(done) == {"stem": 8, "block.0": 3, "head": 8}
    done = Mixed(size_ratio=2.0, overrides={"block.*": 32}, edges="choose", measure="fisher").apply(
        Candidate(module), context_for(module, CNN_DATA)
    )
    assert "block.0" not in bits_of(done)
    assert set(bits_of(done)) == {"stem", "head"}


def test_limits_on_bytes_are_kept() -> None:
    module = seeded(Cnn)
    context = context_for(module, CNN_DATA)
    done = Mixed(max_bytes=800, edges="choose").apply(Candidate(module), context)
    used = 0
    for path, bits in bits_of(done).items():
        weight = module.get_submodule(path).get_parameter("weight")
        used += -(-bits * weight.numel() // 8) + 4 * len(weight)
    assert 600 < used <= 800
    with pytest.raises(ConfigError, match="max_bytes=400 cannot be met"):
        Mixed(max_bytes=400, edges="choose").apply(Candidate(module), context)


def test_chosen_widths_lose_no_more_than_equal_ones(problem: Any) -> None:
    step = Mixed(average_bits=4.0, edges="choose", choices=[2, 4, 8])
    record = step.apply(Candidate(problem.model()), context_of(problem)).history[-1].quantization
    assert record is not None
    chosen = sum(layer.losses[record.widths.index(layer.weight_bits)] for layer in record.layers)
    equal = sum(layer.losses[record.widths.index(4)] for layer in record.layers)
    assert chosen <= equal
    assert record.average_bits <= 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "set one of average_bits, max_bytes, size_ratio"),
        ({"average_bits": 4.0, "size_ratio": 4.0}, "set one of"),
        ({"average_bits": 4.0, "choices": [1]}, "expected widths of 2 to 8 bits, or 32"),
        ({"average_bits": 4.0, "weight_bits": 4}, "weight_bits is chosen for each layer"),
        ({"average_bits": 4.0, "measure": "guess"}, "measure"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mixed(**fields)


def test_both_steps_are_recipes() -> None:
    recipe = Recipe([Mixed(average_bits=4.0, choices=[2, 4, 8], rounding="gptq")], name="narrow")
    assert parse_recipe(dump_recipe(recipe)) == recipe
    step = parse_recipe("steps: [{quantize.fallback: {max_drop: 0.02, weight_bits: 4}}]").steps[0]
    assert step == Fallback(max_drop=0.02, weight_bits=4)
    assert step.needs == {"calibrate", "search"}


# --- fallback


def test_layers_return_until_the_drop_is_allowed(problem: Any) -> None:
    context = context_of(problem)
    before = accuracy(problem.net, problem)
    plain = Static(weight_bits=2, edge_bits=2).apply(Candidate(problem.model()), context)
    assert plain.simulation is not None
    assert before - accuracy(plain.simulation, problem) > 0.02
    done = Fallback(weight_bits=2, edge_bits=2, max_drop=0.01).apply(Candidate(problem.model()), context)
    assert done.simulation is not None
    assert before - accuracy(done.simulation, problem) <= 0.01
    (record,) = done.history
    assert record.quantization is not None
    widths = {layer.name: layer.weight_bits for layer in record.quantization.layers}
    assert {path: bits for path, bits in widths.items() if bits != 32} == bits_of(done)
    assert 2 in widths.values()  # not all had to
    assert record.notes[0].startswith("drop of top1 ")
    assert "on 400 examples of the search split" in record.notes[0]
    assert record.notes[1].startswith("round 1: returned 0 layers to 8 bits, 0 to float, drop +")
    assert not [note for note in record.notes if note.startswith("target not met")]


def test_if_all_is_well_nothing_returns(problem: Any) -> None:
    done = Fallback(max_drop=0.05).apply(Candidate(problem.model()), context_of(problem))
    assert "returned: none" in done.history[-1].notes[0]
    assert set(bits_of(done).values()) == {8}
    assert len([note for note in done.history[-1].notes if note.startswith("round")]) == 1


def test_a_budget_that_cannot_be_met_gives_the_best_and_says_so(problem: Any) -> None:
    step = Fallback(weight_bits=2, activation_bits=2, edge_bits=2, max_drop=0.0, overrides={"0": 2, "4": 2})
    done = step.apply(Candidate(problem.model()), context_of(problem))
    assert done.history[-1].notes[0].startswith("target not met: the drop is +")
    assert done.simulation is not None
    rounds = [note for note in done.history[-1].notes if note.startswith("round")]
    drops = [float(note.rpartition("drop ")[2]) for note in rounds]
    reached = accuracy(problem.net, problem) - accuracy(done.simulation, problem)
    assert reached == pytest.approx(min(drops), abs=1e-4)
    assert (bits_of(done)["0"], bits_of(done)["4"]) == (2, 2)  # what the user fixed stays


def test_what_pruning_lost_is_not_searched_for(problem: Any) -> None:
    context, damaged = context_of(problem), problem.model()
    with torch.no_grad():
        damaged[0].weight.zero_()
    done = Fallback(max_drop=0.01).apply(Candidate(damaged), context)
    assert "before anything is quantized" in done.history[-1].notes[0]
    assert done.history[-1].notes[0].startswith("target not met")
    assert len([note for note in done.history[-1].notes if note.startswith("round")]) == 1


def test_it_looks_at_the_calibrate_and_search_splits_only(problem: Any) -> None:
    images, labels = problem.images()
    context = context_of(problem, certify=(images[600:900], labels[600:900]), report=(images[900:950], labels[900:950]))

    class Sealed:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("nobody may look here")

    context.task.splits = {**context.task.splits, "certify": Sealed(), "report": Sealed()}  # type: ignore[dict-item]
    Fallback(weight_bits=4, max_drop=0.05).apply(Candidate(problem.model()), context)
    with pytest.raises(DataError, match=r"quantize\.fallback needs a 'search' split"):
        Fallback().apply(Candidate(problem.model()), context_for(problem.net, (images[:50], labels[:50])))


def test_agreement_counts_where_there_are_no_labels() -> None:
    module = seeded(Cnn)
    context = context_for(module, None, calibrate=CNN_DATA, search=normal(100, 3, 8, 8, seed=5))
    done = Fallback(max_drop=0.2).apply(Candidate(module), context)
    assert done.history[-1].notes[0].startswith("drop of agreement ")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1), st.integers(0, 40))
def test_bisection_finds_the_fewest_in_few_rounds(values: list[float], allowed: float, middle: int) -> None:
    drops = sorted(values, reverse=True)
    asked: set[int] = set()

    def drop(returned: int) -> float:
        asked.add(returned)
        return drops[returned]

    stops = sorted({0, min(middle, len(drops) - 1), len(drops) - 1})
    found = fewest(drop, allowed, stops)
    good = [number for number, value in enumerate(drops) if value <= allowed]
    assert found == good[0] if good else drops[found] == drops[-1]
    assert len(asked) <= 3 + math.ceil(math.log2(len(drops) + 1))
