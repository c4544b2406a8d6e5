"""What each decision does to the model alone, before any training, and how pairs of decisions add up.

Frantar et al. 2022 (SPDY), https://arxiv.org/abs/2201.13096; Kurtić et al. 2023 (ZipLM),
https://arxiv.org/abs/2302.04089.

Shapes: `B` batch, `K` classes, `U` units of a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import frozen_copy
from tersor.core.config import Config
from tersor.core.context import Progress
from tersor.core.search import Choice, DamageRecord, DamageRow
from tersor.core.surgery import SkippedBlock
from tersor.errors import ConfigError, DataError, NonFiniteError
from tersor.graph import Family
from tersor.graph.blocks import bypassed, find_blocks
from tersor.graph.coupling import runs_of
from tersor.prune import Structure
from tersor.prune.choosing import Choosing, Material
from tersor.quantize.sensitivity import divergence
from tersor.search.space import BLOCK, Group, Space

Measure = Literal["divergence", "mse", "loss"]
Loss = Callable[[Tensor, Tensor], Tensor]
EXAMPLES = (2, 3)  # two batch sizes: what follows the batch is not what follows the model


@dataclass(frozen=True)
class DamageTable:
    """Damages of single decisions, and of pairs beyond the sum of their parts.

    Attributes:
        measure: What a damage is: `divergence`, `mse` or `loss`; see `measure_damage`.
        damages: Group -> units that stay -> damage; 0 while all of them do.
        pairs: Two groups at their strongest options -> damage of both together, less the sum of their damages.
    """

    measure: str
    damages: Mapping[str, Mapping[int, float]]
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def of(self, group: Group, option: int) -> float:
        """Damage of one decision alone.

        Raises:
            ConfigError: if it was not measured.
        """
        if option == group.options[0]:
            return 0.0
        try:
            return self.damages[group.name][option]
        except KeyError:
            raise ConfigError(
                f"damages: nothing was measured of {group.name!r} with {option} of {group.options[0]} units; "
                "measure the damages of this space"
            ) from None

    def strength(self, group: Group, option: int) -> float:
        """Damage of an option over that of the strongest, within 0 and 1: what a pair's interaction is scaled by.

        Where the strongest does no damage, units that go over those that go at most.
        """
        whole, least = group.options[0], group.options[-1]
        most = self.of(group, least)
        if option in (whole, least) or most <= 0:
            return (whole - option) / max(1, whole - least)
        return min(1.0, max(0.0, self.of(group, option) / most))

    def predict(self, space: Space, choice: Choice) -> float:
        """``Σ_g d_g(o_g) + Σ_(g,h) d_gh · s_g(o_g) · s_h(o_h)``, with the strengths `s` of `strength`.

        What is inside skipped blocks counts nothing.

        Raises:
            ConfigError: if a decision was not measured.
        """
        options = space.options(choice)
        for group in space.groups:
            if group.inside in choice.skipped:
                options[group.name] = group.options[0]
        alone = sum(self.of(group, options[group.name]) for group in space.groups)
        strengths = {group.name: self.strength(group, options[group.name]) for group in space.groups}
        return alone + sum(extra * strengths[one] * strengths[other] for (one, other), extra in self.pairs.items())

    def record(self, space: Space) -> DamageRecord:
        """The table as the report keeps it."""
        rows = [
            DamageRow(
                name=group.name,
                kind=group.kind,
                options=list(group.options),
                damages=[self.of(group, option) for option in group.options],
            )
            for group in space.groups
        ]
        return DamageRecord(
            measure=self.measure, rows=rows, pairs=[(*pair, extra) for pair, extra in self.pairs.items()]
        )


class DamageSettings(Config):
    """How damages are measured.

    Attributes:
        criterion: Which units of a family go; a name from `prune.criteria`, as in the recipe that carries it out.
        pairs: How many pairs of decisions are measured together; fewer than groups, since they form no cycle.
        seed: Chooses the pairs.
        measure: `divergence`, ``mean KL(softmax(y) ‖ softmax(ŷ))`` of the original's outputs `y [B, …, K]` and the
            changed model's `ŷ`; `mse`, ``‖ŷ − y‖² / ‖y‖²``; `loss`, the rise of the task's loss. By default the
            divergence where the labels are classes, else `mse`.
    """

    criterion: str = "l2"
    pairs: int = Field(default=12, ge=0)
    seed: int = 0
    measure: Measure | None = None


def measure_damage(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    *,
    output: str | int | None = None,
    loss: Loss | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> DamageTable:
    """Measures what each option of each group does alone: one pass over the batches per option, no surgery.

    A block is bypassed. Of a family the least important units go, ranked once: all parameters that belong to them are
    zero, which is the pruned model wherever no statistic runs over the units; a layer norm over a stream still counts
    the zeros. BatchNorm statistics are not re-estimated. Of pairs, neighbours in the order of the model come first.

    ```python
    table = measure_damage(model, space, batches, measure="divergence", pairs=12)
    table.predict(space, choice)
    ```

    Args:
        model: Stays as it is.
        space: Of this model.
        batches: On the device of the model.
        output: Key or index of the output that counts.
        loss: `(outputs, labels) -> scalar`, for the measure `loss` and for criteria from gradients.
        progress: Told after every pass.
        **settings: Fields of `DamageSettings`: `criterion` ("l2"), `pairs` (12), `seed` (0), `measure`.

    Raises:
        ConfigError: if a setting is wrong, a loss is missing, or the space is of another model.
        DataError: without batches, or without labels where the loss is to be measured.
        NonFiniteError: if the outputs or a damage are NaN or Inf.
    """
    wanted = DamageSettings(**settings)
    if not batches:
        raise DataError("damages are measured on data, got no batches")
    if wanted.measure == "loss" and loss is None:
        raise ConfigError("measure 'loss' needs loss=..., (outputs, labels) -> scalar")
    bench = _Bench(frozen_copy(model), batches, output, wanted.measure, loss)
    changes = _Changes(bench.model, space, _material(batches, output, loss), wanted.criterion)
    tried = _pairs(space.groups, wanted.pairs, wanted.seed)
    total, done = sum(len(group.options) - 1 for group in space.groups) + len(tried), 0

    def damage(options: Mapping[str, int]) -> float:
        nonlocal done
        with changes.made(options):
            value = bench.damage()
        if not math.isfinite(value):
            raise NonFiniteError(f"the damage of {dict(options)} is {value}; check the model's weights and the data")
        done += 1
        if progress is not None:
            progress("damage", done, total)
        return value

    damages = {
        group.name: {group.options[0]: 0.0} | {option: damage({group.name: option}) for option in group.options[1:]}
        for group in space.groups
    }
    together = {}
    for one, other in tried:
        strongest = {group.name: group.options[-1] for group in (one, other)}
        together[one.name, other.name] = damage(strongest) - sum(
            damages[name][kept] for name, kept in strongest.items()
        )
    return DamageTable(bench.measure, damages, together)


class _Bench:
    """Runs a model, as it is now, and compares it with what it was at first."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        output: str | int | None,
        measure: Measure | None,
        loss: Loss | None,
    ) -> None:
        self.model, self.batches, self.output, self.loss = model, batches, output, loss
        self.answers = [self._answer(batch).clone() for batch in batches]
        for index, answer in enumerate(self.answers):
            if not bool(torch.isfinite(answer).all()):
                raise NonFiniteError(f"batch {index}: the model's output has NaN or Inf")
        classes = all(map(_of_classes, self.answers, batches))
        self.measure: Measure = measure or ("divergence" if classes else "mse")
        if self.measure == "divergence" and any(answer.ndim < 2 or answer.shape[-1] < 2 for answer in self.answers):
            raise ConfigError("measure 'divergence' needs scores of classes [B, …, K]; take 'mse' or 'loss'")
        self.examples = sum(map(len, batches))
        self.energy = sum(float(answer.double().square().sum()) for answer in self.answers)
        self.before = sum(map(self._loss, self.answers, batches)) / self.examples if self.measure == "loss" else 0.0

    def damage(self) -> float:
        """In the unit of the measure."""
        total = 0.0
        for batch, expected in zip(self.batches, self.answers, strict=True):
            answer = self._answer(batch)
            if self.measure == "loss":
                total += self._loss(answer, batch)
            elif self.measure == "divergence":
                total += float(divergence(answer, expected))
            else:
                total += float((answer.double() - expected.double()).square().sum())
        if self.measure == "mse":
            return total / max(self.energy, torch.finfo(torch.float64).tiny)
        return total / self.examples - self.before

    def _answer(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return select_output(batch.call(self.model), self.output)

    def _loss(self, answer: Tensor, batch: Batch) -> float:
        if self.loss is None or batch.labels is None:
            raise DataError("measure 'loss' needs labels in every batch; take 'divergence' or 'mse'")
        return float(self.loss(answer, batch.labels)) * len(batch)


def _of_classes(answer: Tensor, batch: Batch) -> bool:
    labels = batch.labels
    if labels is None or labels.is_floating_point() or answer.ndim < 2 or answer.shape[-1] < 2:
        return False
    return labels.shape == answer.shape[:-1]


class _Changes:
    """Carries decisions out on a model of its own, and takes them back."""

    def __init__(self, model: nn.Module, space: Space, material: Material, criterion: str) -> None:
        self.model, self.space = model, space
        paths = [group.name for group in space.groups if group.kind == BLOCK]
        names = [group.name for group in space.groups if group.kind != BLOCK]
        found = find_blocks(model, runs_of(material.examples), paths)[0] if paths else []
        self.blocks: dict[str, SkippedBlock] = {block.path: block for block in found}
        self.families: dict[str, Family] = {}
        self.order: dict[str, Tensor] = {}
        if names:
            choosing = Choosing(model, Structure(criterion=criterion, verify="off"), material)
            sizes = {name: space.by_name[name].options[0] for name in names}
            self.families = {f.name: f for f in choosing.families if sizes.get(f.name) == f.size}
            self.order = {name: choosing.scores[name].argsort(stable=True).cpu() for name in self.families}
        lost = sorted({*paths, *names} - {*self.blocks, *self.families})
        if lost:
            raise ConfigError(
                f"damages: {lost} cannot go in {type(model).__name__}, or criterion {criterion!r} says nothing about "
                "them; discover the space of this model, or choose another criterion"
            )
        self.tensors = dict(model.named_parameters())

    @contextmanager
    def made(self, options: Mapping[str, int]) -> Iterator[None]:
        """The model of the body, with these numbers of units left."""
        saved: dict[str, Tensor] = {}
        skipped = [self.blocks[name] for name in options if name in self.blocks]
        try:
            for name, kept in options.items():
                if name in self.families:
                    self._zero(self.families[name], self.order[name][: self.families[name].size - kept], saved)
            with bypassed(self.model, skipped):
                yield
        finally:
            with torch.no_grad():
                for path, tensor in saved.items():
                    self.tensors[path].copy_(tensor)

    def _zero(self, family: Family, units: Tensor, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for place, entries in family.members.items():
                tensor = self.tensors.get(place.parameter)
                if tensor is not None:  # buffers behind a scale and a shift of zero have no say
                    saved.setdefault(place.parameter, tensor.clone())
                    tensor.index_fill_(place.dim, entries[units].flatten().to(tensor.device), 0)


def _material(batches: Sequence[Batch], output: str | int | None, loss: Loss | None) -> Material:
    """Examples that couple the model, and what criteria are measured on."""

    def selected(outputs: Any, labels: Tensor | None) -> Tensor:
        if loss is None or labels is None:
            raise DataError("a criterion from gradients needs loss=... and labels in every batch")
        return loss(select_output(outputs, output), labels)

    examples = [batches[0].map(lambda x, n=n: x[torch.arange(n) % len(x)]) for n in EXAMPLES]  # type: ignore[misc]
    runs = [batch.kwargs or batch.args for batch in examples]
    return Material(runs, list(batches), selected if loss is not None else None, None)


def _pairs(groups: Sequence[Group], count: int, seed: int) -> list[tuple[Group, Group]]:
    """Adjacent blocks, one block with a family outside it, then whatever is near; in a seeded order, without cycles.

    Damages saturate, so interactions are mostly negative. Along a cycle they would be taken off too often; without
    one no sum falls below its parts, as long as no pair damages less than one of its two.
    """
    random = np.random.default_rng(seed)
    blocks = [group for group in groups if group.kind == BLOCK]
    families = [group for group in groups if group.kind != BLOCK]
    near = [*pairwise(blocks)]
    mixed = [(block, family) for block in blocks for family in families if family.inside != block.name]
    rest = [*pairwise(families)]
    near, mixed, rest = ([pairs[i] for i in random.permutation(len(pairs))] for pairs in (near, mixed, rest))
    first = near[: max(0, count - 1)]
    tree = {group.name: group.name for group in groups}
    found: list[tuple[Group, Group]] = []
    for one, other in (*first, *mixed[:1], *near[len(first) :], *rest, *mixed[1:]):
        old, new = tree[one.name], tree[other.name]
        if old != new and len(found) < count:
            tree = {name: new if root == old else root for name, root in tree.items()}
            found.append((one, other))
    return found
