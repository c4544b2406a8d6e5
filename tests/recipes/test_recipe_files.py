from __future__ import annotations

from pathlib import Path

import pytest

from tersor.core.recipe import Recipe
from tersor.distill import EveryKth, OnceForAll, Recover
from tersor.errors import ConfigError, OrderError
from tersor.prune import (
    DepthStep,
    ExpertsStep,
    Gradual,
    LotteryTicket,
    SparseLearning,
    Structured,
    Unstructured,
)
from tersor.quantize import Dynamic, Fallback, Half, Mixed, Qat, Static, WeightOnly
from tersor.recipes import dump_recipe, load_recipe, parse_recipe, preset_names, preset_text, resolve, step_types
from tersor.train import Schedule


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_the_way_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(preset_text(name))
    assert recipe.name == name
    assert parse_recipe(dump_recipe(recipe)) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == load_recipe(str(file)) == recipe
    assert dump_recipe(load_recipe(file)) == dump_recipe(recipe)


def test_the_presets_are_the_documented_ones() -> None:
    assert preset_names() == [
        "cnn-constrained",
        "cnn-edge",
        "convert",
        "float16",
        "int4-static",
        "int4-weights",
        "int8",
        "int8-dynamic",
        "iterative-int8",
        "lm-constrained",
        "prune-distill",
        "prune-recover-int8",
        "qat-distill",
        "rnn-constrained",
        "shallow-int8",
        "sparse-recover-int8",
        "transformer-constrained",
        "transformer-edge",
    ]
    assert parse_recipe(preset_text("convert")).steps == ()
    assert parse_recipe(preset_text("int8")).steps == (Static(range_method="mse"),)
    prune, recover, quantize = parse_recipe(preset_text("prune-recover-int8")).steps
    assert prune == Structured(amount=0.3, round_to=4)
    losses = [{"kd": {"weight": 0.9, "temperature": 4.0}}, {"task": {"weight": 0.1}}]
    assert recover == Recover(schedule=Schedule(epochs=1, lr=0.01), losses=losses)
    assert quantize == Static()
    sparse = parse_recipe(preset_text("sparse-recover-int8")).steps
    assert sparse == (Unstructured(sparsity=0.5), recover, quantize)
    third = Structured(amount=0.16, criterion="l2", round_to=4)
    assert parse_recipe(preset_text("iterative-int8")).steps == (
        *(third, Recover(schedule=Schedule(epochs=1, lr=0.01))) * 3,
        quantize,
    )
    prune, recover = parse_recipe(preset_text("prune-distill")).steps
    assert prune == Structured(target={"macs": 0.5}, criterion="l2", round_to=4)
    assert recover == Recover(schedule=Schedule(epochs=5, lr=0.02), losses=losses)
    every_kth, recover, last = parse_recipe(preset_text("shallow-int8")).steps
    assert (every_kth, last) == (EveryKth(share=0.5), quantize)
    assert recover == Recover(schedule=Schedule(epochs=3, lr=0.02), losses=losses)
    (qat,) = parse_recipe(preset_text("qat-distill")).steps
    assert qat == Qat(weight_bits=4, schedule=Schedule(epochs=2, lr=0.01, weight_decay=1e-4), distill="kd", pack=True)


def test_every_setting_survives_the_way_through_yaml() -> None:
    recipe = Recipe(
        [
            Static(range_method="percentile", samples=17, batch_size=3),
            Unstructured(sparsity=1 / 3, floor=0.0),
            Structured(target={"macs": 0.7}, kinds=("channel", "head"), exclude=("head.*", "a*"), compensate=True),
            Structured(allocation={"stem.*": 0.2}, verify="together"),
            EveryKth(layers=3, keep="last", path="encoder.layers"),
            Recover(
                schedule=Schedule(epochs=7, lr=1e-5, optimizer="adamw", clip_norm=0.5, warmup=0.25),
                losses=["mse", {"hint": {"weight": 2.5, "pairs": [("a", "b[1]")]}}, {"crd": {"width": 7}}],
                cache=True,
            ),
            Static(),
        ],
        name="all: of # it",
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_every_known_step_has_its_name() -> None:
    assert step_types() == {
        "distill.every_kth": EveryKth,
        "distill.once_for_all": OnceForAll,
        "prune.depth": DepthStep,
        "prune.experts": ExpertsStep,
        "prune.gradual": Gradual,
        "prune.lottery_ticket": LotteryTicket,
        "prune.sparse_learning": SparseLearning,
        "prune.structured": Structured,
        "prune.unstructured": Unstructured,
        "quantize.dynamic": Dynamic,
        "quantize.fallback": Fallback,
        "quantize.half": Half,
        "quantize.mixed": Mixed,
        "quantize.qat": Qat,
        "quantize.static": Static,
        "quantize.weight_only": WeightOnly,
        "recover": Recover,
    }


def test_a_step_without_settings_may_be_only_its_name() -> None:
    steps = (Recover(), Static())
    assert parse_recipe("steps: [recover, quantize.static]").steps == steps
    assert parse_recipe("steps: [{recover: }, {quantize.static: {}}]").steps == steps
    assert parse_recipe("steps: []").name == "custom"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mapping with 'name' and a list 'steps', got None"),
        ("- recover", "mapping with 'name' and a list 'steps'"),
        ("name: x", "list 'steps'"),
        ("steps: recover", "list 'steps'"),
        ("steps: []\nsteep: 1", "mapping with 'name'"),
        ("name: [1]\nsteps: []", r"'name' must be text, got \[1\]"),
        ("steps: {", "not valid YAML: .*line 1"),
        ("steps:\n  - recover\n - static", "not valid YAML: .*line"),
        ("steps: [!!python/object/apply:os.system ['true']]", "not valid YAML"),
        ("steps: [recover, prun]", r"step 2: expected a step of \['distill.every_kth', .*got 'prun'"),
        ("steps: [5]", "step 1: expected one 'name: settings', got 5"),
        ("steps: [{recover: {}, quantize.static: {}}]", "step 1: expected one 'name: settings'"),
        ("steps: [{recover: 3}]", r"step 1 \(recover\): settings must be a mapping .*got 3"),
        ("steps: [{recover: [losses]}]", r"step 1 \(recover\): settings must be a mapping"),
        ("steps: [{recover: {1: 2}}]", r"step 1 \(recover\): settings must be a mapping"),
        ("steps: [recover, {prune.unstructured: {sparsity: 2}}]", r"step 2: Unstructured\.sparsity.*got 2"),
        ("steps: [{prune.structured: {amount: 1}}]", r"step 1: Structured\.amount.*got 1"),
        (
            "steps: [{prune.structured: {amount: 0.1, target: {macs: 0.5}}}]",
            r"step 1: Structured.*one of amount, target",
        ),
        ("steps: [{prune.structured: {kinds: channel}}]", r"step 1: Structured\.kinds.*got 'channel'"),
        ("steps: [{prune.structured: {criterion: x}}]", r"step 1: .*criterion: expected one of .*got 'x'"),
        ("steps: [{prune.unstructured: {}}]", r"step 1: Unstructured.*expected a sparsity or a threshold"),
        ("steps: [{prune.unstructured: {sparsity: 0.5, criterion: x}}]", r"step 1: Unstructured\.criterion.*'x'"),
        ("steps: [{quantize.static: {range: mse}}]", r"step 1: Static\.range: Extra inputs.*got 'mse'"),
        ("steps: [{recover: {schedule: {lr: high}}}]", r"step 1: Recover\.schedule.*Schedule\.lr.*got 'high'"),
        ("steps: [{recover: {schedule: {epochs: '3'}}}]", r"Schedule\.epochs.*got '3'"),
    ],
)
def test_a_mistake_is_refused_saying_where(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^my.yaml.*{said}"):
        parse_recipe(text, "my.yaml")


def test_an_impossible_order_is_refused() -> None:
    with pytest.raises(OrderError, match=r"step 2 \(recover\)"):
        parse_recipe("steps: [quantize.static, recover]")


def test_a_file_that_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")
    file = tmp_path / "wrong.yaml"
    file.write_text("steps: [nothing]")
    with pytest.raises(ConfigError, match=rf"{file}, step 1"):
        load_recipe(file)
    file.write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ConfigError, match=r"wrong\.yaml"):
        load_recipe(file)


def test_a_recipe_is_resolved_from_whatever_names_it(tmp_path: Path) -> None:
    both, only_float = frozenset({"float32", "int8"}), frozenset({"float32"})
    recipe = Recipe([Recover()], name="mine")
    file = tmp_path / "mine.yml"
    file.write_text(dump_recipe(recipe))
    assert resolve(recipe, both) is recipe
    assert resolve(file, both) == resolve(str(file), only_float) == recipe
    assert resolve("int8", both) == parse_recipe(preset_text("int8"))
    assert resolve("auto", both).steps == (Static(),)
    assert resolve("auto", only_float).steps == ()
    with pytest.raises(ConfigError, match=r"\['cnn-constrained', .*'convert', 'float16', .*'sparse-.*\].*got 'int4'"):
        resolve("int4", both)
