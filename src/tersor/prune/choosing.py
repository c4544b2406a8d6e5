"""Which units go: what structured pruning decides before it cuts."""

from __future__ import annotations

import copy
import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, as_batch
from tersor.errors import ConfigError, CoverageError, UnsupportedError
from tersor.graph import Coupling, Frozen, Verifier, apply_surgery, couple, plan_surgery
from tersor.graph.coupling import Run, runs_of
from tersor.graph.coupling.trace import Rule
from tersor.probe import collect, multiply_accumulates
from tersor.prune.allocation import reach
from tersor.prune.outcome import count_parameters
from tersor.prune.scoring import Scorer
from tersor.prune.sparsity import FROM_LOSS, batches_of
from tersor.prune.structure import DEFAULT_AMOUNT, Structure, choose

Loss = Callable[[Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class ChosenUnits:
    """What a structured pruning would remove.

    Attributes:
        coupling: What goes together; print it.
        units: Family name -> numbers of the units that would go, ascending; families that stay whole are left out.
        families: Names of all families that may be cut: asked for, and verified.
        frozen: What could not be removed, with the reason.
    """

    coupling: Coupling
    units: Mapping[str, Tensor]
    families: tuple[str, ...]
    frozen: list[Frozen]


def choose_units(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Any = None,
    loss: Loss | None = None,
    rules: Mapping[str, Rule] | None = None,
    **settings: Any,
) -> ChosenUnits:
    """Finds the units that `structured` would remove with the same arguments, and removes none.

    ```python
    chosen = tersor.prune.choose_units(model, images, amount=0.5)
    learned = tersor.prune.sparse_learning(model, chosen.coupling, training, penalty, chosen=chosen.units)
    smaller = tersor.prune.structured(learned.model, images, amount=0.5).model
    ```

    All are chosen at once, `rounds` or not, and nothing is refitted. The check on the model's own weights comes with
    the surgery, so `structured` may still freeze more.

    Args:
        model: Stays as it is.
        example_inputs: As for `structured`, like everything else.
        data: For measured criteria.
        loss: For criteria from gradients.
        rules: For operators of your own.
        **settings: Fields of `Structure`.

    Raises:
        ConfigError: if a setting is wrong, or data or a loss is missing.
        ModelError: if the model does not run on the example inputs.
        CoverageError: if nothing can be pruned, with the reasons.
    """
    wanted = Structure(**settings).model_copy(update={"rounds": 1, "compensate": False})
    material = Material.of(wanted, example_inputs, data, loss, rules)
    with evaluation(model):
        choosing = Choosing(model, wanted, material)
        units = choosing.units()
    return ChosenUnits(choosing.coupling, units, tuple(f.name for f in choosing.families), choosing.frozen)


@dataclass(frozen=True)
class Material:
    """What is given beside the model and the settings."""

    examples: Any
    batches: list[Any] | None
    loss: Loss | None
    rules: Mapping[str, Rule] | None

    @classmethod
    def of(
        cls, settings: Structure, examples: Any, data: Any, loss: Loss | None, rules: Mapping[str, Rule] | None
    ) -> Material:
        """Checks that everything is there that `settings` need."""
        needs = settings.needs_evidence
        if needs and data is None:
            raise ConfigError(
                f"criterion {settings.criterion!r}{' with compensation' if settings.compensate else ''} is measured on "
                f"data ({', '.join(sorted(needs))}); pass data=..., batches of examples"
            )
        if needs & FROM_LOSS and loss is None:
            raise ConfigError(
                f"criterion {settings.criterion!r} is taken from gradients; pass loss=..., a function "
                "(outputs, labels) -> scalar"
            )
        return cls(examples, None if data is None else list(batches_of(data)), loss, rules)


def given_batches(data: Any, loss: Loss | None, *, by_loss: bool) -> list[Batch] | None:
    """Data as batches; None without any.

    Raises:
        ConfigError: if losses are to be compared, `by_loss`, and data or a loss is missing.
    """
    if by_loss and (data is None or loss is None):
        raise ConfigError(
            "criterion 'loss' needs data=..., batches of examples, and loss=..., (outputs, labels) -> scalar"
        )
    return None if data is None else [as_batch(item, f"batch {n}") for n, item in enumerate(batches_of(data))]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Evaluation mode for the body, which gets the modes as they were, by path."""
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        yield modes
    finally:
        set_modes(model, modes)


def set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Training or evaluation mode of every module, by path."""
    for path, module in model.named_modules():
        module.training = modes.get(path, module.training)


class Choosing:
    """Couples, verifies, scores and ranks; the model, in evaluation mode, stays as it is.

    Attributes:
        coupling: What goes together.
        families: That may be cut.
        frozen: What cannot be removed, with the reason.
        evidence: What was measured.
        macs: Multiply-accumulates on the first example input.
        error: Largest difference that verification saw; None without.
        shortfall: Why the last choice misses the target; empty if it does not.
        notes: What a reader must know.
        seconds: Spent on `coupling`, `scoring`, `verification`.

    Raises, when it is made:
        CoverageError: if nothing can be pruned, with the reasons.
    """

    def __init__(self, model: nn.Module, settings: Structure, material: Material) -> None:
        self.model, self.settings, self.material = model, settings, material
        self.runs = runs_of(material.examples)
        self.seconds: dict[str, float] = {}
        self.error: float | None = None
        self.shortfall = ""
        self.notes: list[str] = []
        with Timer(self.seconds, "coupling"):
            self.coupling = couple(model, material.examples, rules=material.rules)
        self.frozen = list(self.coupling.frozen)
        self.macs = multiply_accumulates(model, *self.runs[0])
        self.families = list(self.coupling.families)
        reasons = {family.name: settings.wants(family) for family in self.families}
        self.freeze([Frozen(name, reason) for name, reason in reasons.items() if reason])
        if settings.verify == "full":
            self._verify()
        with Timer(self.seconds, "scoring"):
            self.evidence = collect(model, material.batches or (), needs=settings.needs_evidence, loss=material.loss)
            self.scores = self._scores()

    def units(self) -> dict[str, Tensor]:
        """Family name -> numbers of the units that go."""
        settings, self.shortfall = self.settings, ""
        if settings.target is None:
            amount = DEFAULT_AMOUNT if settings.amount is None else settings.amount
            return choose(self.families, self.scores, settings, amount)
        ((goal, value),) = settings.target.items()
        whole = self.macs if goal == "macs" else size_of(self.model, goal, self.runs[0])
        limit = value * whole if value <= 1 else value

        def cost(amount: float) -> float:
            removed = choose(self.families, self.scores, settings, amount)
            smaller = apply_surgery(copy.deepcopy(self.model), plan_surgery(self.model, self.coupling, removed))
            return size_of(smaller, goal, self.runs[0])

        found = reach(limit, cost)
        if not found.reached:
            self.shortfall = (
                f"target not met: {goal} {found.cost:,.0f} is the least that floors and frozen parts allow, "
                f"{limit:,.0f} was asked for"
            )
        return choose(self.families, self.scores, settings, found.amount)

    def freeze(self, items: Sequence[Frozen]) -> None:
        """Leaves families whole from now on; raises `CoverageError` if none is left."""
        self.frozen += items
        gone = {item.name for item in items}
        self.families = [family for family in self.families if family.name not in gone]
        allocation = self.settings.allocation
        if isinstance(allocation, dict):  # amounts for what is frozen now are void; those for nothing stay, an error
            names, frozen = {family.name for family in self.families}, {item.name for item in self.frozen}
            allocation = {
                pattern: amount
                for pattern, amount in allocation.items()
                if fnmatch.filter(names, pattern) or not fnmatch.filter(frozen, pattern)
            }
            self.settings = self.settings.model_copy(update={"allocation": allocation})
        if not self.families or not allocation:
            raise CoverageError(
                f"nothing of {type(self.model).__name__} can be pruned: "
                + ("; ".join(f"{item.name}: {item.reason}" for item in self.frozen[:8]) or "it has no parameters")
            )

    def _verify(self) -> None:
        """Each family alone and all together, on random weights."""
        with Timer(self.seconds, "verification"):
            rules, seed = self.material.rules, self.settings.seed
            verifier = Verifier(self.model, self.coupling, self.runs, rules=rules, seed=seed)
            _, frozen, self.error = verifier.settle([family.name for family in self.families])
        if len(verifier.runs) < 2:
            self.notes.append("verified at one input shape only: the model does not take another one")
        self.freeze(frozen)

    def _scores(self) -> dict[str, Tensor]:
        """By family; those that the criterion says nothing about are frozen."""
        settings = self.settings
        scorer = Scorer(
            dict(self.model.named_parameters()),
            self.evidence,
            settings.criterion_,
            reduction=settings.reduction,
            normalise="none" if settings.normalise == "cost" else settings.normalise,
        )
        scores, silent, last = {}, [], None
        for family in self.families:
            try:
                scores[family.name] = scorer(family)
            except UnsupportedError as error:
                last = error
                silent.append(Frozen(family.name, f"criterion {settings.criterion!r} says nothing about it"))
        if last is not None and not scores:
            raise last
        self.freeze(silent)
        if settings.normalise == "cost":
            return {name: score / self._saved(name) for name, score in scores.items()}
        return scores

    def _saved(self, family: str) -> float:
        """What one unit less saves of what the target counts: multiply-accumulates where there is no target."""
        goal = next(iter(self.settings.target or {"macs": 0}))
        surgery = plan_surgery(self.model, self.coupling, {family: torch.tensor([0])})
        smaller = apply_surgery(copy.deepcopy(self.model), surgery)
        return max(1, size_of(self.model, goal, self.runs[0]) - size_of(smaller, goal, self.runs[0]))


class Timer:
    """Adds the time of its body to an entry."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.started


def size_of(model: nn.Module, goal: str, run: Run) -> int:
    """What a goal counts: MACs of one call, parameters, or bytes of parameters and buffers."""
    if goal == "macs":
        return multiply_accumulates(model, *run)
    if goal == "parameters":
        return count_parameters(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
