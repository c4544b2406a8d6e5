"""Sparse learning before pruning: training pushes the units that will go towards zero, so that losing them costs less.

Growing regularisation (GReg-1): Wang et al. 2021, https://arxiv.org/abs/2012.09243, on coupled units as in Fang et
al. 2023, https://arxiv.org/abs/2301.12900; group lasso: Wen et al. 2016, https://arxiv.org/abs/1608.03665.

Shapes: `U` units of a family, `E` entries of one unit at one place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.candidate import apply_masks
from tersor.core.config import Config
from tersor.errors import ConfigError
from tersor.graph import Coupling, Family
from tersor.prune.gradual import Training


class Penalty(Config):
    """How units are pushed.

    Attributes:
        method: `growing` adds ``λ/2 · Σ ‖w_u‖²`` over the units that will go, and λ grows; `lasso` adds
            ``λ · Σ √|w_u| · ‖w_u‖`` over all units, or those that will go, |w_u| being the unit's number of entries.
        strength: λ of the lasso; of `growing` what λ rises by each time.
        every: Optimizer steps between two rises of `growing`.
        ceiling: Largest λ of `growing`.
    """

    method: Literal["growing", "lasso"] = "growing"
    strength: float = Field(default=1e-3, gt=0)
    every: int = Field(default=5, ge=1)
    ceiling: float = Field(default=1.0, gt=0)

    def at(self, step: int) -> float:
        """λ at an optimizer step, counted from 0."""
        if self.method == "lasso":
            return self.strength
        return min(self.ceiling, self.strength * (1 + step // self.every))


@dataclass(frozen=True)
class Learned:
    """A model whose units were pushed.

    Attributes:
        model: A trained copy, in evaluation mode.
        before: Family name -> norms of its units `[U]` before.
        after: The same afterwards.
        trace: Mean loss by epoch, penalty included.
    """

    model: nn.Module
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    trace: Sequence[float]


def squared_norms(parameters: Mapping[str, Tensor], family: Family) -> Tensor:
    """``‖w_u‖²`` over everything learned that each unit owns, `[U]`; differentiable."""
    total = torch.zeros(family.size)
    for place, members in family.members.items():
        weight = parameters.get(place.parameter)
        if weight is not None and weight.is_floating_point():
            others = [dim for dim in range(weight.ndim) if dim != place.dim]
            squares = weight.square()
            slices = squares.sum(others) if others else squares
            total = total.to(slices.device) + slices[members.to(slices.device)].sum(1)
    return total


def penalty(
    parameters: Mapping[str, Tensor],
    families: Sequence[Family],
    chosen: Mapping[str, Tensor],
    settings: Penalty,
    step: int = 0,
) -> Tensor:
    """The term that is added to the loss.

    Args:
        parameters: Of the model, by path.
        families: That are pushed.
        chosen: Family name -> numbers of the units that will go; families without are left alone.
        settings: Which penalty.
        step: Optimizer steps so far.
    """
    total = torch.zeros(())
    strength = settings.at(step)
    for family in families:
        units = chosen.get(family.name)
        if units is None or not len(units):
            continue
        squares = squared_norms(parameters, family)[units]
        if settings.method == "growing":
            total = total + strength / 2 * squares.sum()
        else:
            total = total + strength * _entries(parameters, family) ** 0.5 * (squares + 1e-12).sqrt().sum()
    return total


def _entries(parameters: Mapping[str, Tensor], family: Family) -> int:
    """How many learned entries one unit owns."""
    return sum(
        members.shape[1] * (parameters[place.parameter].numel() // parameters[place.parameter].shape[place.dim])
        for place, members in family.members.items()
        if place.parameter in parameters
    )


def sparse_learning(
    model: nn.Module,
    coupling: Coupling,
    training: Training,
    settings: Penalty,
    *,
    chosen: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Learned:
    """Trains a copy of `model` with a penalty on its units.

    Args:
        model: Stays as it is.
        coupling: From `tersor.graph.couple`.
        training: Data, loss, schedule; the penalty is added to its loss.
        settings: Which penalty, how strong.
        chosen: Family name -> numbers of the units that will go, e.g. from `choose_units`; all units where left out,
            which `growing` does not allow: it would push everything to zero.
        masks: Entries that are gone already; they stay so.

    Raises:
        ConfigError: if `growing` is asked for without `chosen`, or a family does not exist.
    """
    if chosen is None and settings.method == "growing":
        raise ConfigError("growing regularisation pushes the units that will go: pass chosen={family: units}")
    names = {family.name for family in coupling.families}
    unknown = sorted(set(chosen or {}) - names)
    if unknown:
        raise ConfigError(f"chosen names {unknown}, which are no families of this coupling; print it to see them")
    pushed = chosen if chosen is not None else {f.name: torch.arange(f.size) for f in coupling.families}
    copied = copy.deepcopy(model)
    before, steps = _norms(copied, coupling), 0

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        term = penalty(dict(module.named_parameters()), coupling.families, pushed, settings, steps)
        return training.loss(module, batch) + term

    def after_step() -> None:
        nonlocal steps
        steps += 1
        apply_masks(copied, masks or {})

    trace = replace(training, loss=loss).run(copied, after_step)
    return Learned(copied, before, _norms(copied, coupling), trace)


def _norms(model: nn.Module, coupling: Coupling) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        return {family.name: squared_norms(parameters, family).sqrt() for family in coupling.families}
