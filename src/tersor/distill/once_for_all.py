"""One network that is many: units in the order of their importance, sub-networks that share all weights.

Cai et al. 2020 (once for all), https://arxiv.org/abs/1908.09791; Yu & Huang 2019 (sandwich rule, distillation in
place), https://arxiv.org/abs/1903.05134.

Shapes: `U` units of a family, `E` entries of one unit at one place.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.surgery import SkippedBlock, Surgery
from tersor.core.task import Task
from tersor.distill.losses import kd
from tersor.distill.objective import Objective, mask_of
from tersor.errors import CoverageError, TersorError
from tersor.graph import Coupling, Family, Frozen, Verdict, apply_surgery, couple, plan_surgery
from tersor.graph.blocks import bypassed, find_blocks
from tersor.graph.coupling import Run, runs_of
from tersor.graph.coupling.couple import named_tensors, run_alike
from tersor.graph.verify import TOLERANCE, distance, other_shapes, randomised, sound_together

Orders = Mapping[str, Tensor]  # family -> `[U]`: the unit that comes to each place in line
Vectors = Sequence[tuple[str, Tensor]]  # parameter -> ones and zeros that its entries are multiplied by


class Subnetwork(nn.Module):
    """A part of a model, with the model's own weights; gradients reach only what stays.

    Its weights are ``w ⊙ m``, with `m` zero wherever a unit that is gone owns the entry; blocks that are skipped answer
    with their input. It works on copies of the buffers, so running statistics stay those of the whole model.

    Args:
        model: Stays as it is.
        vectors: Of the units that are gone.
        skipped: Blocks of the model.
    """

    def __init__(self, model: nn.Module, vectors: Vectors, skipped: Sequence[SkippedBlock]) -> None:
        super().__init__()
        self.model, self.vectors, self.skipped = model, vectors, skipped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-network answers."""
        tensors = {path: buffer.clone() for path, buffer in self.model.named_buffers()}
        for path, vector in self.vectors:
            weight = tensors[path] if path in tensors else self.model.get_parameter(path)
            tensors[path] = weight * vector.to(weight)
        with bypassed(self.model, self.skipped):
            return torch.func.functional_call(self.model, tensors, args, kwargs)


@dataclass(frozen=True)
class Selection:
    """One sub-network.

    Attributes:
        kept: Family -> how many of its first units stay; families that are left out stay whole.
        skipped: Numbers of the blocks that are skipped.
    """

    kept: Mapping[str, int]
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Elastic:
    """What of a model may shrink: families to their first units, the model by whole blocks.

    Attributes:
        families: Their units stand in the order of their importance.
        blocks: That may be skipped.
        widths: Shares of a family that may stay.
        depth: Largest share of the blocks that is skipped at once.
        frozen: What could be cut or skipped, but not in training, and why.
    """

    families: tuple[Family, ...]
    blocks: tuple[SkippedBlock, ...]
    widths: tuple[float, ...]
    depth: float
    frozen: tuple[Frozen, ...] = ()

    @property
    def most_skipped(self) -> int:
        """How many blocks are skipped at most."""
        return math.floor(self.depth * len(self.blocks) + 1e-9)

    def smallest(self) -> Selection:
        """Every family at its least share, as many blocks skipped as may be: which ones, chance says."""
        return Selection(
            {f.name: kept_of(f.size, min(self.widths)) for f in self.families}, self._drawn(self.most_skipped)
        )

    def random(self) -> Selection:
        """A share for each family and blocks, all drawn from PyTorch's generator."""
        shares = torch.randint(len(self.widths), (len(self.families),)).tolist()
        kept = {f.name: kept_of(f.size, self.widths[share]) for f, share in zip(self.families, shares, strict=True)}
        return Selection(kept, self._drawn(int(torch.randint(self.most_skipped + 1, ()))))

    def subnetwork(self, model: nn.Module, selection: Selection) -> Subnetwork:
        """A part of the model, as a module that computes with the model's weights."""
        parameters = dict(model.named_parameters())
        vectors = []
        for family in self.families:
            kept = selection.kept.get(family.name, family.size)
            for place, rows in family.members.items() if kept < family.size else ():
                if place.parameter in parameters:
                    shape = parameters[place.parameter].shape
                    vector = torch.ones(shape[place.dim]).index_fill_(0, rows[kept:].flatten(), 0.0)
                    others = [1] * (len(shape) - place.dim - 1)
                    vectors.append((place.parameter, vector.reshape(-1, *others)))
        return Subnetwork(model, vectors, [self.blocks[number] for number in selection.skipped])

    def notes(self) -> list[str]:
        """For the report."""
        shares = ", ".join(f"{share:g}" for share in sorted(self.widths, reverse=True))
        lines = [
            f"{len(self.families)} families may keep {shares} of their units, "
            f"{self.most_skipped} of {len(self.blocks)} blocks may be skipped at once"
        ]
        return lines + [f"trained whole only: {item.name}: {item.reason}" for item in self.frozen]

    def _drawn(self, count: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(len(self.blocks))[:count].tolist()))


def kept_of(size: int, share: float) -> int:
    """How many of `size` units stay, at least one: what `prune.structured` leaves where ``1 − share`` goes."""
    return max(1, size - round((1 - share) * size))


def organise(
    model: nn.Module, example_inputs: Any, *, widths: Sequence[float], depth: float
) -> tuple[Elastic, dict[str, list[tuple[int, Tensor]]]]:
    """Puts the units of every family of `model` in the order of their importance, in place; finds what may shrink.

    A unit's importance is the mean, over its places, of the L2 norm of what it owns there. The model computes what it
    computed. All is tried, on the model's own weights and on random ones: families whose units cannot change places,
    families of which masked weights alone do not compute what the smaller model computes (a layer norm over what is
    masked), and blocks that cannot be bypassed are left alone.

    Args:
        model: In evaluation mode.
        example_inputs: As for `tersor.graph.couple`.
        widths: Shares of a family that may stay.
        depth: Largest share of the blocks that is skipped at once.

    Returns:
        What may shrink, and how entries have moved: parameter or buffer -> `(dimension, its old indices)`.

    Raises:
        ModelError: if the model does not run on the example inputs.
        CoverageError: if nothing may shrink, with the reasons.
    """
    runs = runs_of(example_inputs)
    coupling = couple(model, example_inputs)
    blocks, unskippable = find_blocks(model, runs) if depth else ([], [])
    frozen = list(unskippable)
    trial = _Trial(model, coupling, runs, blocks)

    def settle(names: Sequence[str], check: Callable[[Sequence[str]], Verdict], where: str) -> list[str]:
        sound, wrong, _ = sound_together(names, check, where=where)
        frozen.extend(wrong)
        return sound

    orders = {f.name: importance(f, model).argsort(descending=True, stable=True) for f in coupling.families}
    names = [family.name for family in coupling.families if family.size > 1]
    names = settle(names, partial(trial.moved, orders), "its units cannot change places")
    moves = moves_of([coupling[name] for name in names], orders, model)
    move(named_tensors(model), moves)
    kept = {name: kept_of(coupling[name].size, min(widths)) for name in names}
    names = [name for name in names if kept[name] < coupling[name].size]
    names = settle(names, partial(trial.sliced, kept), "masked weights are not the smaller model")
    paths = settle([block.path for block in blocks], trial.skipped, "it cannot be bypassed")
    elastic = Elastic(
        tuple(coupling[name] for name in names),
        tuple(block for block in blocks if block.path in paths),
        tuple(widths),
        depth,
        tuple(frozen),
    )
    if not elastic.families and not elastic.most_skipped:
        why = [*frozen, *coupling.frozen][:8]
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in why) or "it has no units and no blocks"
        raise CoverageError(f"{type(model).__name__} has no sub-networks at these widths and this depth: {reasons}")
    return elastic, moves


def importance(family: Family, model: nn.Module) -> Tensor:
    """``mean over places of ‖what unit u owns there‖₂``, `[U]`, in float64; buffers do not count."""
    parameters, norms = dict(model.named_parameters()), []
    for place, rows in family.members.items():
        weight = parameters.get(place.parameter)
        if weight is not None and weight.is_floating_point():
            squares = weight.detach().double().square().movedim(place.dim, 0)
            norms.append(squares.reshape(len(squares), -1).sum(1).cpu()[rows].sum(1).sqrt())
    return torch.stack(norms).mean(0) if norms else torch.zeros(family.size, dtype=torch.float64)


def moves_of(families: Sequence[Family], orders: Orders, model: nn.Module) -> dict[str, list[tuple[int, Tensor]]]:
    """Where the entries of parameters and buffers come from: `(dimension, old indices)`, once for each dimension."""
    tensors = named_tensors(model)
    found: dict[tuple[str, int], Tensor] = {}
    for family in families:
        for place, rows in family.members.items():
            size = tensors[place.parameter].shape[place.dim]
            index = found.setdefault((place.parameter, place.dim), torch.arange(size))
            index[rows.flatten()] = rows[orders[family.name]].flatten()
    moves: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for (name, dim), index in found.items():
        moves[name].append((dim, index))
    return dict(moves)


def move(tensors: Mapping[str, Tensor], moves: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
    """Puts entries at their new indices, in place."""
    with torch.no_grad():
        for name, parts in moves.items():
            value = tensors[name]
            for dim, index in parts:
                value = value.index_select(dim, index.to(value.device))
            tensors[name].copy_(value)


class Sandwich:
    """`(module, batch) -> scalar`: the mean over the whole network, the smallest and random ones in between.

    The whole network learns what `objective` says, the others its answers: ``kd(part(x), stop_gradient(whole(x)))``.

    Args:
        elastic: Of the module that is trained.
        objective: `(module, batch) -> scalar`, that calls the module once.
        task: Says which output counts.
        random: Sub-networks between the whole and the smallest.
        temperature: Of the answers.
    """

    def __init__(self, elastic: Elastic, objective: Objective, task: Task, *, random: int, temperature: float) -> None:
        self.elastic, self.objective, self.task = elastic, objective, task
        self.random, self.temperature = random, temperature
        self.selections: list[Selection] = []

    def draw(self, step: int, total: int) -> None:
        """Chooses the sub-networks of a step; a hook before it, where random numbers depend on the step alone."""
        self.selections = [self.elastic.smallest(), *(self.elastic.random() for _ in range(self.random))]

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch."""
        called: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

        def whole(*args: Any, **kwargs: Any) -> Any:
            output = module(*args, **kwargs)
            called.append((args, kwargs, output))  # what the objective has blended, all networks see blended alike
            return output

        losses = [self.objective(cast("nn.Module", whole), batch)]
        args, kwargs, output = called[-1]
        wanted = select_output(output, self.task.output).detach()
        for selection in self.selections:
            answers = select_output(self.elastic.subnetwork(module, selection)(*args, **kwargs), self.task.output)
            losses.append(self._distance(batch, answers, wanted))
        return torch.stack(losses).mean()

    def _distance(self, batch: Batch, answers: Tensor, wanted: Tensor) -> Tensor:
        return kd(answers, wanted, temperature=self.temperature, mask=mask_of(batch, answers))


class _Trial:
    """Tries variants of a model, on its own weights and on random ones under which everything shows."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, runs: Sequence[Run], blocks: Sequence[SkippedBlock]
    ) -> None:
        self.coupling, self.blocks = coupling, {block.path: block for block in blocks}
        self.random = randomised(model, runs, 0)
        self.pairs = [(self.random, [*runs, *other_shapes(self.random, runs[0])]), (model, runs)]

    def moved(self, orders: Orders, names: Sequence[str]) -> Verdict:
        """Units in another order: on random weights in a random one, which is no reversal."""
        families = [self.coupling[name] for name in names]
        generator = torch.Generator().manual_seed(0)
        chance = {family.name: torch.randperm(family.size, generator=generator) for family in families}

        def reordered(model: nn.Module) -> nn.Module:
            other = copy.deepcopy(model)
            move(named_tensors(other), moves_of(families, chance if model is self.random else orders, model))
            return other

        return self._compare(reordered, lambda model: model)

    def sliced(self, kept: Mapping[str, int], names: Sequence[str]) -> Verdict:
        """Families that are cut, and families whose weights are masked."""
        removed = {name: torch.arange(kept[name], self.coupling[name].size) for name in names}
        elastic = Elastic(tuple(self.coupling[name] for name in names), (), (1.0,), 0.0)
        selection = Selection({name: kept[name] for name in names})
        return self._compare(
            lambda model: apply_surgery(copy.deepcopy(model), plan_surgery(model, self.coupling, removed)),
            lambda model: elastic.subnetwork(model, selection),
        )

    def skipped(self, paths: Sequence[str]) -> Verdict:
        """Blocks that are gone, and blocks that are bypassed."""
        blocks = tuple(self.blocks[path] for path in paths)
        return self._compare(
            lambda model: apply_surgery(copy.deepcopy(model), Surgery(skipped=blocks)),
            lambda model: Subnetwork(model, (), blocks),
        )

    def _compare(
        self, changed: Callable[[nn.Module], nn.Module], expected: Callable[[nn.Module], nn.Module]
    ) -> Verdict:
        worst = 0.0
        for model, runs in self.pairs:
            try:
                variant, reference = changed(model), expected(model)
                with torch.no_grad():
                    for args, kwargs in runs:
                        wanted = run_alike(reference, args, kwargs)
                        worst = max(worst, distance(run_alike(variant, args, kwargs), wanted))
            except TersorError as failure:
                return Verdict(float("inf"), 0.0, f"it fails: {failure.__cause__ or failure}")
        return Verdict(worst, 1.0, "" if worst <= TOLERANCE else f"outputs differ by {worst:.1e} of their scale")
