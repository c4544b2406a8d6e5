"""Terms: how they may be written, what is refused and how it is said, and the way through YAML."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.recipe import Recipe
from tersor.distill import Recover, Term
from tersor.distill.losses import LOSSES
from tersor.distill.terms import STANDARD, Losses
from tersor.errors import ConfigError
from tersor.recipes import dump_recipe, parse_recipe


def terms(losses: Any) -> tuple[Term, ...]:
    return Losses(losses=losses).losses


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("kd", [Term(loss="kd")]),
        ({"kd": None}, [Term(loss="kd")]),
        ({"kd": {}}, [Term(loss="kd")]),
        ({"loss": "kd"}, [Term(loss="kd")]),
        (Term(loss="kd"), [Term(loss="kd")]),
        (["kd", "task"], [Term(loss="kd"), Term(loss="task")]),
        (("kd", Term(loss="task")), [Term(loss="kd"), Term(loss="task")]),
        ({"kd": {"weight": 2, "temperature": 3}}, [Term(loss="kd", weight=2.0, settings={"temperature": 3})]),
        ({"loss": "kd", "weight": 2.0, "settings": {"temperature": 3}},
         [Term(loss="kd", weight=2.0, settings={"temperature": 3})]),
        ({"hint": {"pairs": [["a", "b"], ["c", "d"]]}}, [Term(loss="hint", pairs=(("a", "b"), ("c", "d")))]),
        ([{"kd": {"temperature": 2}}, {"kd": {"temperature": 8}}],
         [Term(loss="kd", settings={"temperature": 2}), Term(loss="kd", settings={"temperature": 8})]),
    ],
)  # fmt: skip
def test_a_term_may_be_written_short_or_in_full(written: Any, meant: list[Term]) -> None:
    assert terms(written) == tuple(meant)


def test_without_a_word_it_is_distillation_with_a_little_of_the_labels() -> None:
    assert Losses().losses == STANDARD == terms([{"kd": {"weight": 0.9}}, {"task": {"weight": 0.1}}])


def test_which_terms_look_at_features() -> None:
    seen = {name for name in LOSSES if Term(loss=name, settings={"heads": 2} if "minilm" in name else {}).on_features}
    assert seen == {name for name, kind in LOSSES.items() if kind.on == "features"}
    assert not Term(loss="task").on_features


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("kdd", "there is no distillation loss 'kdd'; did you mean 'kd'"),
        ("similarity", "no distillation loss 'similarity'"),
        ({"kd": {"temprature": 3}}, "kd has no setting 'temprature'; did you mean 'temperature'"),
        ({"kd": {"temperature": 0}}, "kd.temperature: expected a number above 0, got 0"),
        ({"minilm_relations": {}}, "minilm_relations.heads must be given"),
        ({"kd": {"weight": 0}}, "weight: Input should be greater than 0, got 0"),
        ({"kd": {"weight": -1.0}}, "weight: Input should be greater than 0"),
        ({"kd": {"weight": float("inf")}}, "weight: Input should be a finite number"),
        ({"kd": {"weight": float("nan")}}, "weight: Input should be"),
        ({"kd": {"weight": "1"}}, "weight: Input should be a valid number"),
        ({"kd": 3}, "expected settings of 'kd', such as {kd: {weight: 0.9, temperature: 2}}, got 3"),
        ({"kd": {}, "task": {}}, "each in an entry of its own"),
        ({}, "expected one term"),
        ({1: 2}, "expected terms such as"),
        ([5], "Term, got 5"),
        (3, "losses: .*, got 3"),
        (None, "losses: .*, got None"),
        ([], "at least 1 item"),
        (["kd", "kd"], "kd: there twice in the same form"),
        (["hint", {"hint": {"weight": 2}}], "hint: there twice in the same form"),
        ({"task": {"alpha": 1}}, "the task's loss has neither settings nor pairs"),
        ({"task": {"pairs": [["a", "b"]]}}, "the task's loss has neither settings nor pairs"),
        ({"kd": {"pairs": [["a", "b"]]}}, "kd compares outputs; pairs are for losses on features"),
        ({"hint": {"pairs": [["a"]]}}, "pairs.0.1: Field required"),
        ({"hint": {"pairs": ["ab"]}}, "pairs.0: Input should be a valid tuple"),
        ({"loss": "kd", "temperature": 2}, "temperature: Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_hint(written: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        terms(written)
    with pytest.raises(ConfigError, match=said):
        Recover(losses=written)


def test_two_terms_of_one_loss_must_differ_in_more_than_the_weight() -> None:
    pairs = [("a", "b")], [("c", "d")]
    assert len(terms([{"hint": {"pairs": pair}} for pair in pairs])) == 2
    with pytest.raises(ConfigError, match="twice"):
        terms([{"hint": {"pairs": pairs[0], "weight": weight}} for weight in (1, 2)])


SETTINGS = {
    "kd": st.fixed_dictionaries({}, optional={"temperature": st.floats(0.1, 100)}),
    "rkd": st.fixed_dictionaries({}, optional={"distance": st.floats(0, 9), "angle": st.integers(0, 9)}),
    "crd": st.fixed_dictionaries({}, optional={"width": st.integers(1, 9), "channel_axis": st.sampled_from([1, None])}),
    "minilm_relations": st.fixed_dictionaries({"heads": st.integers(1, 48)}),
    "task": st.just({}),
}
NAMES = st.text("abc.[]0:*", min_size=1, max_size=5)


@st.composite
def some_terms(draw: st.DrawFn) -> list[Term]:
    found = []
    for name in draw(st.lists(st.sampled_from(list(SETTINGS)), min_size=1, unique=True)):
        on_features = name not in ("kd", "task")
        pairs = draw(st.lists(st.tuples(NAMES, NAMES), max_size=2)) if on_features else []
        weight = draw(st.floats(0, 1e6, exclude_min=True))
        found.append(Term(loss=name, weight=weight, settings=draw(SETTINGS[name]), pairs=tuple(pairs)))
    return found


@given(some_terms())
def test_every_recipe_survives_the_way_through_yaml(losses: list[Term]) -> None:
    recipe = Recipe([Recover(losses=losses, cache=True)])
    text = dump_recipe(recipe)
    assert parse_recipe(text) == recipe
    assert dump_recipe(parse_recipe(text)) == text


def test_yaml_as_people_write_it() -> None:
    text = """
    steps:
      - recover:
          losses: [{kd: {weight: 0.9, temperature: 2}}, {hint: {weight: 10, pairs: [[layer1, layer2]]}}, task]
    """
    step = parse_recipe(text).steps[0]
    assert step == Recover(
        losses=[
            Term(loss="kd", weight=0.9, settings={"temperature": 2}),
            Term(loss="hint", weight=10.0, pairs=(("layer1", "layer2"),)),
            Term(loss="task"),
        ]
    )
    assert parse_recipe("steps: [{recover: {losses: mse}}]").steps[0] == Recover(losses="mse")
    with pytest.raises(ConfigError, match=r"recipe, step 1: Recover\.losses: .*did you mean 'hint'"):
        parse_recipe("steps: [{recover: {losses: [hunt]}}]")
