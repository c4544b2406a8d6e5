"""Which recipe to start from for a model, a scenario and a target, and why; `advice.yaml` has the rules.

Nothing is trained and nothing is timed: what a recipe gives is quoted from this project's own benchmarks, and only
what it leaves of this very model is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import nn

from tersor.core.budget import Budget
from tersor.core.candidate import frozen_copy
from tersor.core.config import Config
from tersor.core.context import Context
from tersor.core.machine import cpu_flags
from tersor.core.recipe import Recipe
from tersor.core.target import Target
from tersor.core.task import Task
from tersor.errors import ConfigError, TersorError
from tersor.recipes import parse_recipe, preset_text
from tersor.runtimes import get_runtime
from tersor.search.estimate import Estimate, estimate
from tersor.search.family import FamilyName, Profile, profile
from tersor.search.rules import Measured, Rule, Rules, Scenario, Source, read_rules

FLAGS = ("amx_int8", "amx_bf16", "avx512_bf16", "i8mm", "bf16")
MOST_ALTERNATIVES = 3
NOT_MEASURED = "not measured: no benchmark of this project ran this preset on such a model in this runtime"


class RuledOut(Config):
    """A method or a preset that is not advised, and why."""

    method: str
    reason: str
    source: tuple[Source, ...] = ()


class Recommendation(Config):
    """A preset for this model.

    Attributes:
        preset: Its name.
        recipe: Its steps, as data.
        reasons: Why it fits.
        source: What the reasons rest on: pages of the documentation, papers.
        expected: What it gave where this project measured it, a line each; or that it was not measured.
        measured: The same as data.
        estimate: What it leaves of this model.
    """

    preset: str
    recipe: dict[str, Any]
    reasons: tuple[str, ...]
    source: tuple[Source, ...]
    expected: tuple[str, ...]
    measured: tuple[Measured, ...]
    estimate: Estimate


class Advice(Config):
    """What to start from.

    Attributes:
        family: Of the model.
        scenario: That was asked for.
        runtime: Of the target.
        profile: Where the model computes.
        abilities: Of the target.
        recommended: The first rule's preset that can be taken here.
        alternatives: Those of the next rules.
        ruled_out: Methods and presets that are not advised.
        following: What to do with it.
    """

    family: FamilyName
    scenario: Scenario
    runtime: str
    profile: Profile
    abilities: tuple[str, ...]
    recommended: Recommendation
    alternatives: tuple[Recommendation, ...]
    ruled_out: tuple[RuledOut, ...]
    following: tuple[str, ...]


def abilities(target: Target) -> frozenset[str]:
    """What the target can do: instructions of this processor, number formats of the runtime, a CUDA device.

    There is never an `npu`: no runtime here drives one.

    Raises:
        ConfigError: for an unknown runtime.
    """
    flags = cpu_flags()
    found = {flag for flag in FLAGS if flag in flags} | get_runtime(target.runtime).formats
    if any("vnni" in flag for flag in flags):
        found.add("vnni")
    if torch.cuda.is_available():
        found.add("cuda")
    return frozenset(found)


def advise(model: nn.Module, task: Task, *, scenario: Scenario, target: Target, budget: Budget | None = None) -> Advice:
    """The preset to start from, what is known of it, and what was ruled out.

    The first rule that fits wins, unless the runtime has no kernels for its preset, the task lacks a split that it
    needs, it cannot be carried out on this model, or this project measured a drop beyond the budget with it.

    Args:
        model: Stays as it is.
        task: For example inputs, and for the splits that it has.
        scenario: `server`: fast, at next to no loss. `edge`: small and fast, training is welcome. `constrained`: as
            small as it gets. `gpu`: for a GPU, which no runtime here drives.
        target: Where it will run.
        budget: The largest acceptable drop; None rules nothing out by accuracy.

    Raises:
        ConfigError: for an unknown scenario or runtime.
        ModelError: if the model does not run on the task's first examples.
    """
    if scenario not in get_args(Scenario):
        raise ConfigError(f"scenario: expected one of {list(get_args(Scenario))}, got {scenario!r}")
    able, rules, found = abilities(target), read_rules(), profile(model, task)
    twin = frozen_copy(model)
    judge = _Judge(rules, twin, Context(task, target, twin), found, budget)
    ruled_out = [
        RuledOut(
            method=item.method,
            reason=" ".join([item.because, *(rules.by_name[name].told(vnni="vnni" in able) for name in item.measured)]),
            source=item.source,
        )
        for item in rules.ruled_out
        if item.when.holds(found, scenario, target.runtime, able)
    ]
    chosen: list[Recommendation] = []
    seen: set[str] = set()
    for rule in rules.rules:
        if len(chosen) > MOST_ALTERNATIVES or (chosen and rule is rules.rules[-1]):
            break
        if rule.preset in seen:
            continue
        if not rule.when.holds(found, scenario, target.runtime, able):
            continue
        seen.add(rule.preset)
        try:
            chosen.append(judge.recommendation(rule, vnni="vnni" in able))
        except TersorError as error:
            ruled_out.append(RuledOut(method=rule.preset, reason=str(error), source=rule.source))
    first = chosen[0]
    return Advice(
        family=found.family,
        scenario=scenario,
        runtime=target.runtime,
        profile=found,
        abilities=tuple(sorted(able)),
        recommended=first,
        alternatives=tuple(chosen[1:]),
        ruled_out=tuple(ruled_out),
        following=tuple(_following(first, target.runtime, budget)),
    )


class _Judge:
    """Whether presets can be taken here."""

    def __init__(self, rules: Rules, model: nn.Module, context: Context, found: Profile, budget: Budget | None) -> None:
        self.rules, self.model, self.context, self.profile = rules, model, context, found
        self.runtime = get_runtime(context.target.runtime)
        self.most = None if budget is None or budget.max_drop is None else 100 * budget.max_drop

    def recommendation(self, rule: Rule, *, vnni: bool) -> Recommendation:
        """The rule's preset.

        Raises:
            TersorError: with the reason why it cannot be taken.
        """
        recipe = parse_recipe(preset_text(rule.preset), f"preset {rule.preset}")
        self._check_place(recipe)
        measured = self.rules.measurements(self.profile.family, rule.preset, self.runtime.name)
        self._check_budget(measured)
        for step in recipe.steps:
            step.check(self.context)
        return Recommendation(
            preset=rule.preset,
            recipe=recipe.as_data(),
            reasons=(rule.because,),
            source=rule.source,
            expected=tuple(item.told(vnni=vnni) for item in measured) or (NOT_MEASURED,),
            measured=tuple(measured),
            estimate=estimate(self.model, recipe, self.context, macs=self.profile.macs),
        )

    def _check_place(self, recipe: Recipe) -> None:
        """Kernels and splits."""
        for step in recipe.steps:
            self.runtime.check_supports(step.precision, step.name)
            for role in sorted(step.needs):
                self.context.task.require(role, step.name)

    def _check_budget(self, measured: list[Measured]) -> None:
        drops = [item.points for item in measured if item.points is not None]
        if self.most is None or not drops or min(drops) <= self.most:
            return
        where = next(item for item in measured if item.points == min(drops))
        raise ConfigError(
            f"it cost {min(drops):.2f} points on {where.model} ({where.conditions}; {where.source}), the budget is "
            f"{self.most:.2f}; what it costs your model, only a run can tell"
        )


def _following(first: Recommendation, runtime: str, budget: Budget | None) -> Iterator[str]:
    limit = "" if budget is None or budget.max_drop is None else f" --max-drop {budget.max_drop:g}"
    yield f"tersor compress --recipe {first.preset} --target {runtime}{limit} … runs it, measures it and certifies it"
    yield f"tersor compress --recipe auto --minutes 20 --target {runtime}{limit} … searches from there"
