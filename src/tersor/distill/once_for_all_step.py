"""Weight-shared training of many sub-networks, as a step of a recipe; see `tersor.distill.once_for_all`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from tersor.core.candidate import Candidate, apply_masks
from tersor.core.context import Context
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.distill.objective import Objective, check_examples
from tersor.distill.once_for_all import Sandwich, move, organise
from tersor.distill.terms import TASK, Term
from tersor.train import Checkpoints, Hooks, Schedule, answers_of, evaluation, fit

EXAMPLE_BATCHES = (2, 3)  # two sizes: what follows the batch is not what follows the model
Width = Annotated[float, Field(gt=0, le=1)]


class OnceForAll(Step):
    """Trains the candidate so that it can be cut behind any of `widths` and lose blocks, without training again.

    The units of every family are sorted by importance first. In every step the whole network learns from the original
    (``0.9 · kd + 0.1 · task``), and the smallest and `random` others learn from the whole one's answers; each has the
    first units of every family, a share out of `widths`, and skips up to `depth` of the blocks. The losses' mean is
    minimised. Let `prune.structured: {criterion: order}` and `prune.depth: {blocks: …}` follow.
    """

    name: ClassVar[str] = "distill.once_for_all"
    kind: ClassVar[Kind] = "recover"

    widths: tuple[Width, ...] = Field(default=(1.0, 0.75, 0.5), min_length=1, strict=False)
    depth: float = Field(default=0.5, ge=0, lt=1)
    random: int = Field(default=1, ge=0)
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    schedule: Schedule = Field(default_factory=Schedule)

    @model_validator(mode="after")
    def _fits(self) -> OnceForAll:
        if len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths: each share once, got {list(self.widths)}")
        if set(self.widths) == {1.0} and not self.depth:
            raise ValueError("widths of 1 and a depth of 0 leave one network; take `recover` for that")
        if self.schedule.compile or self.schedule.parallel == "sharded":
            raise ValueError(
                "sub-networks compute with weights of their own making, in which neither compilation nor sharding "
                "sees the model's; leave schedule.compile and schedule.parallel out"
            )
        return self

    @property
    def losses(self) -> tuple[Term, ...]:
        """What the whole network learns from."""
        return (
            Term(loss="kd", weight=0.9, settings={"temperature": self.temperature}),
            Term(loss=TASK, weight=0.1),
        )

    @property
    def needs(self) -> frozenset[Role]:
        """The train split, and the search split if it says when to stop."""
        return frozenset({"train"} if self.schedule.patience is None else {"train", "search"})

    def check(self, context: Context) -> None:
        """Raises `ConfigError` or `DataError` if the examples do not suit the losses."""
        context.task.require("train", self.name)
        check_examples(self.losses, context.task, self.schedule, cached=False)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Sorts and trains a copy; `CoverageError` if nothing of it may shrink."""
        started = time.perf_counter()
        self.check(context)
        split = context.task.require("train", self.name)
        fresh = candidate.for_weights()
        module = fresh.module.eval()
        batches = [context.task.example(size) for size in EXAMPLE_BATCHES]
        examples = [batch.kwargs or batch.args for batch in batches]
        elastic, moves = organise(module, examples, widths=self.widths, depth=self.depth)
        fresh = replace(fresh, masks=_moved(fresh.masks, module, moves))
        objective = Objective(
            self.losses, module, context.original, context.task, schedule=self.schedule, seed=context.seed
        )
        sandwich = Sandwich(elastic, objective, context.task, random=self.random, temperature=self.temperature)
        settings = self.model_dump_json(exclude={"schedule"})
        trained = fit(
            module.requires_grad_(True),
            split,
            sandwich,
            schedule=self.schedule,
            seed=context.seed,
            hooks=Hooks(
                before_step=sandwich.draw,
                after_step=lambda: apply_masks(module, fresh.masks),
                evaluate=evaluation(context.task, answers_of(context.original, context.task.output)),
                progress=partial(context.progress, self.name),
            ),
            keep=None if context.directory is None else Checkpoints(context.directory, identity=settings),
        )
        notes = [*trained.told(), *elastic.notes(), *objective.notes]
        return fresh.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)


def _moved(
    masks: Mapping[str, Tensor], module: nn.Module, moves: Mapping[str, list[tuple[int, Tensor]]]
) -> dict[str, Tensor]:
    """Masks whose entries have moved along with those of their parameters, also of tied ones."""
    first = {id(parameter): path for path, parameter in module.named_parameters()}
    found = {path: mask.clone() for path, mask in masks.items()}
    for path, mask in found.items():
        name = first[id(module.get_parameter(path))]
        if name in moves:
            move({name: mask}, {name: moves[name]})
    return found
