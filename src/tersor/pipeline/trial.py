"""One trial of a search, in a process of its own: compress by a recipe, export, compare on the search split."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from tersor.core.candidate import Candidate
from tersor.core.context import NO_FACTS
from tersor.core.files import whole_directory, write_whole
from tersor.core.recipe import Recipe
from tersor.core.search import Choice
from tersor.core.step import Step
from tersor.errors import DataError
from tersor.measure import file_bytes, mac_counts
from tersor.measure.accuracy import Evaluation
from tersor.pipeline.measuring import certify_compared, compare, export, loaded_from
from tersor.pipeline.plan import Plan
from tersor.pipeline.run_directory import RunDirectory
from tersor.pipeline.steps import run_recipe
from tersor.runtimes import Loaded
from tersor.runtimes.parity import check_parity
from tersor.search.space import Space

STAGES, EXPORTED = "stages", "exported"  # in a trial's directory


@dataclass(frozen=True)
class Material:
    """What all trials of a search share; pickled once, into a private directory that ends with the search.

    Attributes:
        plan: Of the run.
        space: What is searched.
        original: The caller's model on the search split.
        identity: Of the search.
        directory: Of the trials.
    """

    plan: Plan
    space: Space
    original: Evaluation
    identity: str
    directory: Path

    def save(self, path: Path) -> Path:
        """Writes it for `read`."""
        path.write_bytes(cloudpickle.dumps(self))
        return path

    @staticmethod
    def read(path: Path) -> Material:
        """What this process's parent wrote."""
        found: Material = cloudpickle.loads(path.read_bytes())
        return found

    def run_of(self, choice: Choice, rung: int) -> RunDirectory:
        """Where the stages and the model files of a trial are kept."""
        identity = {"search": self.identity, "choice": choice.key}
        return RunDirectory(self.directory / f"{choice.key}-{rung}", identity)

    def begin(self, choice: Choice, rung: int) -> RunDirectory:
        """A trial's directory, with what the shorter training left: the longer one goes on from there.

        Each rung has a directory of its own, because at the place where one trains on another rounds.
        """
        run = self.run_of(choice, rung)
        run.claim()
        if rung:
            for stage in sorted((self.run_of(choice, rung - 1).path / STAGES).glob("*.safetensors")):
                _copy(stage, run.path / STAGES / stage.name)
        return run

    def foundation_of(self, steps: Sequence[Step]) -> Path:
        """The stage that a super-network's training leaves."""
        return self._foundation().path / STAGES / f"{len(steps):02d}.safetensors"

    def train_foundation(self, steps: Sequence[Step]) -> None:
        """Runs the steps that all recipes have in common."""
        run = self._foundation()
        run.claim()
        run_recipe(replace(self.plan, recipe=Recipe(steps, name="search-foundation")), run, _silent)

    def _foundation(self) -> RunDirectory:
        return RunDirectory(self.directory / "foundation", {"search": self.identity, "choice": "foundation"})

    def plan_for(self, steps: Sequence[Step], choice: Choice) -> Plan:
        """The run's plan with the choice's recipe."""
        return replace(self.plan, recipe=Recipe(steps, name=f"search-{choice.key}"))

    def candidate(self, steps: Sequence[Step], choice: Choice, rung: int) -> Candidate:
        """The compressed model, from the stages that its trial left."""
        return run_recipe(self.plan_for(steps, choice), self.begin(choice, rung), _silent)

    def loaded(self, steps: Sequence[Step], choice: Choice, rung: int) -> Loaded:
        """How to open the model files that a finished trial left."""
        directory, plan = self.run_of(choice, rung).path / EXPORTED, self.plan
        if plan.runtime.needs_code:
            return loaded_from(plan, self.candidate(steps, choice, rung), directory)
        return Loaded(plan.runtime, directory, plan.signature, plan.target)


@dataclass(frozen=True)
class Outcome:
    """What a trial's process tells; its latency is measured by its parent, when nothing else runs."""

    drop: float
    bound: float
    size_bytes: int
    macs: int
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """The function that a trial's process calls.

    Attributes:
        material: Where `Material` was saved.
        choice: What is tried.
        steps: Its recipe.
        rung: 0 for the shortest training.
        foundation: The stage that the recipe's first step would leave, if it has been run for all trials.
    """

    material: Path
    choice: Choice
    steps: tuple[Step, ...]
    rung: int
    foundation: Path | None = None

    def __call__(self) -> Outcome:
        """Runs the trial; what it leaves is in the choice's directory."""
        shared = Material.read(self.material)
        plan, run = shared.plan_for(self.steps, self.choice), shared.begin(self.choice, self.rung)
        split = plan.task.require("search", "a search")
        if plan.budget.max_drop is None:
            raise DataError("a search needs a budget with max_drop")
        if self.foundation is not None and (self.choice.skipped or self.choice.widths):
            _copy(self.foundation, run.path / STAGES / self.foundation.name)
        candidate = run_recipe(plan, run, _silent)
        directory = run.path / EXPORTED
        shutil.rmtree(directory, ignore_errors=True)
        with whole_directory(directory) as scratch:
            exported = export(plan, candidate, scratch)
            check_parity(exported.loaded, candidate, plan.task.example)
            compared = compare(plan, exported, split, _silent, shared.original)
            size = sum(file_bytes(exported.files).values())
        certificate = certify_compared(plan, compared, plan.budget.max_drop, plan.budget.confidence)
        return Outcome(
            drop=certificate.drop,
            bound=certificate.upper_bound,
            size_bytes=size,
            macs=mac_counts(candidate.module, plan.task.example(1))[""],
            recipe=plan.recipe.as_data(),
        )


@dataclass(frozen=True)
class Foundation:
    """The function that trains what all trials begin with, in a process of its own."""

    material: Path
    steps: tuple[Step, ...]

    def __call__(self) -> None:
        """Trains."""
        Material.read(self.material).train_foundation(self.steps)


def _copy(file: Path, to: Path) -> None:
    """Whole or not at all; what is there stays."""
    if not to.exists():
        write_whole(to, file.read_bytes())


def _silent(label: str, done: int, total: int, facts: Mapping[str, float] = NO_FACTS, /) -> None:
    """A trial's output goes to a log that nobody watches."""
