from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest

from tersor.core.order import LEGAL
from tersor.core.recipe import Recipe
from tersor.core.step import Step
from tersor.distill import Recover
from tersor.errors import ConfigError, OrderError
from tersor.prune import Unstructured
from tersor.quantize import Static

STEPS: dict[str, Step] = {"prune": Unstructured(sparsity=0.5), "recover": Recover(), "quantize": Static()}
ORDERS = [order for length in (1, 2, 3, 4) for order in product(STEPS, repeat=length)]


def problem_of(order: tuple[str, ...]) -> str | None:
    """The documented rule in other words: what is wrong with an order, None if it is legal."""
    if any(pair == ("quantize", "quantize") for pair in pairwise(order)):
        return "nothing changed since the last one"
    if "quantize" in order[:-1] and order[-1] != "quantize":
        return "changes weights after the last quantize step"
    return None


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_of_up_to_four_steps(order: tuple[str, ...]) -> None:
    steps = [STEPS[kind] for kind in order]
    problem = problem_of(order)
    if problem is None:
        assert Recipe(steps).steps == tuple(steps)
    else:
        with pytest.raises(OrderError, match=problem):
            Recipe(steps)


def test_the_table_and_the_examples_of_the_documentation() -> None:
    assert {kind for kind in STEPS if kind in LEGAL[None]} == set(STEPS)
    assert LEGAL["quantize"] == {"prune", "recover"}
    assert LEGAL["prune"] == LEGAL["recover"] == set(STEPS)
    legal = [("prune", "recover", "quantize"), ("quantize", "prune", "recover", "quantize")]
    illegal = [("prune", "quantize", "recover"), ("quantize", "quantize")]
    assert [problem_of(order) for order in legal] == [None, None]
    assert all(problem_of(order) for order in illegal)


def test_the_reason_names_the_steps_and_their_positions() -> None:
    with pytest.raises(OrderError, match=r"step 2 \(quantize.static\) cannot follow step 1 \(quantize.static\)"):
        Recipe([Static(), Static()])
    with pytest.raises(OrderError, match=r"step 3 \(recover\) .* \(quantize.static\).* move recover before it"):
        Recipe([STEPS["prune"], Static(), Recover()])
    with pytest.raises(OrderError, match=r"step 2 \(prune.unstructured\)"):
        Recipe([Static(), STEPS["prune"], Recover()])


def test_an_empty_recipe_is_legal_and_anything_but_steps_is_refused() -> None:
    assert Recipe().steps == ()
    wrong: list[Any] = [Static(), "recover"]
    with pytest.raises(ConfigError, match=r"Recipe\.steps\[1\]: expected a Step, got str"):
        Recipe(wrong)


def test_a_recipe_is_frozen_and_equal_by_content() -> None:
    recipe = Recipe([Static()], name="a")
    with pytest.raises(AttributeError):
        recipe.steps = ()  # type: ignore[misc]
    assert recipe == Recipe((Static(),), name="a")
    assert recipe != Recipe([Static(samples=5)], name="a")
    assert recipe.as_data() == {
        "name": "a",
        "steps": [{"quantize.static": Static().model_dump(mode="json")}],
    }
