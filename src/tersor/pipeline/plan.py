"""Everything that can be checked before any work is done."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core.artifact import dump_surgeries
from tersor.core.batch import select_output
from tersor.core.budget import Budget
from tersor.core.candidate import Candidate, check_finite_weights, frozen_copy
from tersor.core.files import sha256
from tersor.core.recipe import Recipe
from tersor.core.signature import Signature, input_names, signature_of
from tersor.core.split import Split
from tersor.core.target import Target
from tersor.core.task import Role, Task
from tersor.core.weights import tensors_hash
from tersor.errors import ConfigError, ModelError, NonFiniteError, SplitTooSmallError
from tersor.measure import smallest_certifiable
from tersor.measure.certificate import RESAMPLED_UP_TO
from tersor.measure.ledger import level_of
from tersor.prune.masks import check
from tersor.recipes import resolve
from tersor.runtimes import Runtime, get_runtime
from tersor.search.settings import Search

EXAMPLE_BATCH = 2
HASHED_BATCH = 256
SEARCHED = "search"  # what a recipe is called that is yet to be found
MINIMUM_FOR_BOOTSTRAP = 100  # below, resampling knows too little of the spread to mean anything


@dataclass(frozen=True)
class Plan:
    """A validated run.

    Attributes:
        start: Where the recipe starts: a frozen copy of the caller's model, with what was done to it before.
        task: The data.
        budget: What may be lost.
        target: Where it will run.
        recipe: What will be done.
        runtime: How it will run there.
        signature: What goes in and out.
        seed: Fixes every random choice.
        search: What finds the recipe; None: it is given.
    """

    start: Candidate
    task: Task
    budget: Budget
    target: Target
    recipe: Recipe
    runtime: Runtime
    signature: Signature
    seed: int
    search: Search | None = None

    @property
    def original(self) -> nn.Module:
        """The caller's model: teacher, reference, baseline."""
        return self.start.module

    def fingerprint(self) -> dict[str, str]:
        """What makes this run this run; a run directory is resumed only by an equal one."""
        return {
            "model": start_hash(self.start),
            "task": _hash(self._task_data()),
            "recipe": _hash(self.recipe.as_data() if self.search is None else self.search.model_dump(mode="json")),
            "target": _hash(self.target.model_dump(mode="json")),
            "budget": _hash(self._budget_data()),
            "seed": str(self.seed),
        }

    def _budget_data(self) -> dict[str, Any]:
        """Runs of former versions have no minutes."""
        return self.budget.model_dump(mode="json", exclude={"minutes"} if self.budget.minutes is None else None)

    def _task_data(self) -> dict[str, Any]:
        """Everything of the task that ends up in weights, numbers or files; functions by name only."""
        task = self.task
        attached = {name: sha256(path) for name, path in task.attachments.items()}
        return {
            **({"attachments": attached} if attached else {}),  # runs of former versions have none
            "metric": task.metric.name,
            "output": repr(task.output),
            "class_names": task.class_names,
            "preprocessing": task.preprocessing,
            "splits": {role: data_hash(split) for role, split in task.splits.items()},
        }

    def as_data(self) -> dict[str, Any]:
        """The resolved plan as plain data, for people and `--dry-run`."""
        parameters = sum(parameter.numel() for parameter in self.original.parameters())
        return {
            "model": type(self.original).__name__,
            "parameters": parameters,
            "splits": {role: len(split) for role, split in self.task.splits.items()},
            "metric": self.task.metric.name,
            "recipe": self.recipe.as_data() if self.search is None else {"search": self.search.model_dump(mode="json")},
            "target": self.target.model_dump(mode="json"),
            "budget": self.budget.model_dump(mode="json"),
            "inputs": {spec.name: [spec.dtype, *spec.shape] for spec in self.signature.inputs},
            "seed": self.seed,
        }


def make_plan(
    model: nn.Module | Candidate,
    task: Task,
    *,
    budget: Budget,
    target: Target,
    recipe: str | Path | Recipe | Search,
    seed: int = 0,
) -> Plan:
    """Checks model, data, recipe, target and budget against each other.

    Raises:
        ConfigError, DataError, ModelError, RuntimeUnavailableError, UnsupportedError: saying what, where and
            what to do; nothing was written and nothing was changed.
    """
    start = model if isinstance(model, Candidate) else Candidate(model)
    if not isinstance(start.module, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type(start.module).__name__}")
    if start.plan is not None:
        raise ConfigError("model: expected a float model, got a quantized candidate; quantize as a step of the recipe")
    runtime = get_runtime(target.runtime)
    runtime.check_available()
    search = _search(recipe, budget)
    resolved = Recipe(name=SEARCHED) if isinstance(recipe, Search) or search else resolve(recipe, runtime.formats)
    if search is not None:
        _check_search(search, task, budget)
    for step in resolved.steps:
        runtime.check_supports(step.precision, step.name)
        for role in sorted(step.needs):
            task.require(role, step.name)
    _check_budget(task, budget)
    check_finite_weights(start.module)
    check(start.module, start.masks)
    try:
        start = replace(start, module=frozen_copy(start.module))
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be copied ({error}); remove hooks, graphs and open files from it"
        ) from error
    signature = _signature(start.module, task, target)
    return Plan(start, task, budget, target, resolved, runtime, signature, seed, search)


def _search(recipe: str | Path | Recipe | Search, budget: Budget) -> Search | None:
    """The search that is asked for, if any."""
    if isinstance(recipe, Search):
        return recipe if budget.minutes is None else recipe.model_copy(update={"minutes": budget.minutes})
    if budget.minutes is None:
        return None
    if recipe != "auto":
        raise ConfigError(
            "Budget.minutes is for recipe='auto' or a tersor.search.Search; a given recipe takes its time"
        )
    return Search(minutes=budget.minutes)


def _check_search(search: Search, task: Task, budget: Budget) -> None:
    if budget.max_drop is None:
        raise ConfigError("a search needs Budget(max_drop=...): the fastest model inside no budget is an empty one")
    if budget.minimise != "latency":
        raise ConfigError(
            f"a search minimises latency, got Budget(minimise={budget.minimise!r}); give a recipe instead"
        )
    roles: tuple[Role, ...] = (
        ("search", "certify") if search.kinds == () else ("train", "calibrate", "search", "certify")
    )
    for role in roles:
        task.require(role, "a search")


def model_hash(module: nn.Module) -> str:
    """Hash of a model's class and of every parameter and buffer."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    digest.update(tensors_hash(module.state_dict()).encode())
    return digest.hexdigest()


def start_hash(start: Candidate) -> str:
    """Hash of a model, and of its masks and surgeries, if it has any."""
    if not start.masks and not start.surgeries:
        return model_hash(start.module)
    digest = hashlib.sha256(model_hash(start.module).encode())
    digest.update(tensors_hash(start.masks).encode())
    digest.update(dump_surgeries(start.surgeries))
    return digest.hexdigest()


def data_hash(split: Split) -> str:
    """Hash of a split's inputs and labels in their order, which training depends on."""
    digest = hashlib.sha256()
    for batch in split.batches(HASHED_BATCH):
        labels = {} if batch.labels is None else {"labels": torch.as_tensor(batch.labels)}
        digest.update(tensors_hash({**batch.tensors(), **labels}).encode())
    return digest.hexdigest()


def _signature(original: nn.Module, task: Task, target: Target) -> Signature:
    example = task.example(EXAMPLE_BATCH)
    example.check_finite("the first examples")
    try:
        with torch.no_grad():
            raw = example.call(copy.deepcopy(original))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the model does not run on the task's first examples {_shapes(example.tensors())}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    output = select_output(raw, task.output)
    if output.ndim == 0 or output.shape[0] != EXAMPLE_BATCH:
        raise ModelError(
            f"the output must have the batch as first dimension: expected {EXAMPLE_BATCH} rows, "
            f"got shape {tuple(output.shape)}"
        )
    if not bool(torch.isfinite(output).all()):
        raise NonFiniteError("the model's output on the first examples has NaN or Inf; check its weights and inputs")
    return signature_of(input_names(original, example), example, output, target, task.output)


def _check_budget(task: Task, budget: Budget) -> None:
    if budget.max_drop is None:
        return
    split, bounds = task.require("certify", "a budget with max_drop"), task.metric.bounds
    if bounds is not None and budget.max_drop > bounds[1] - bounds[0]:
        raise ConfigError(
            f"Budget.max_drop: {task.metric.name} lies between {bounds[0]:g} and {bounds[1]:g} (0.01 = one point of "
            f"accuracy), so a drop of {budget.max_drop:g} would allow anything"
        )
    needed, level = 0, level_of(budget.confidence, 1)
    if task.metric.aggregate is not None and level > RESAMPLED_UP_TO:
        raise ConfigError(
            f"Budget.confidence: {task.metric.name} is certified by resampling, which cannot tell confidences as high "
            f"as {budget.confidence!r}; ask for 0.999 or less"
        )
    if bounds is None:
        needed = MINIMUM_FOR_BOOTSTRAP
    elif budget.max_drop > 0 and bounds == (0.0, 1.0):
        needed = smallest_certifiable(budget.max_drop, level)
    if len(split) < needed:
        raise SplitTooSmallError(
            f"split 'certify' has {len(split)} examples; to certify a drop of at most {budget.max_drop:g} of "
            f"{task.metric.name} at confidence {budget.confidence:g} (the first question to a split is tested "
            f"at {level:g}) at least {needed} are needed even if no prediction changes. Give it more examples, allow "
            "a larger max_drop, or pass Budget(max_drop=None) to do without"
        )


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _shapes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items())
