"""Scores of units: what a criterion says about single weights, gathered over everything a unit owns.

Shapes: `U` units of a family, `E` entries of one unit at one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tersor.errors import ConfigError, NonFiniteError, UnsupportedError
from tersor.graph.coupling.family import Family, Place
from tersor.prune.criteria.base import Criterion, Evidence, has_needs, missing

Reduction = Literal["sum", "mean", "max"]
Normalise = Literal["none", "mean", "max", "size"]
NOTHING = Evidence()


class Scorer:
    """Scores families one after another; what a criterion says about a weight is computed once.

    A unit's score at a place sums the scores of all entries that it owns there; where a criterion has signed terms,
    it is the square of their sum. A weight that is coupled along two dimensions counts at both. A criterion that judges
    units as such is asked once for each family.

    Args:
        tensors: Learned parameters by path; places that are not here (buffers) have no say, and neither have
            integers, nor parameters of which the criterion's needs were not measured.
        evidence: By path; a parameter without any is scored without.
        criterion: Of `prune.criteria`.
        reduction: Over places: `sum`, `mean`, `max`. Sum and mean rank the units of one family alike; they differ
            where families of different numbers of places are compared with `normalise` at `none`.
        normalise: What makes families comparable in a ranking over all of them. `none`: nothing, the scores are in
            one unit already, such as a change of the loss. `mean`: the family's mean (absolute) score becomes 1;
            `max`: its largest becomes 1. `size`: score per parameter that a unit owns at the scored places.

    Raises:
        ConfigError: if an option is unknown, or nothing that the criterion needs was measured.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        evidence: Mapping[str, Evidence],
        criterion: Criterion,
        *,
        reduction: Reduction = "mean",
        normalise: Normalise = "mean",
    ) -> None:
        for field, value, options in (
            ("reduction", reduction, ("sum", "mean", "max")),
            ("normalise", normalise, ("none", "mean", "max", "size")),
        ):
            if value not in options:
                raise ConfigError(f"{field}: expected one of {options}, got {value!r}")
        for need in sorted(criterion.needs):
            if all(getattr(known, need) is None for known in evidence.values()):
                raise missing(criterion.name, need)
        self.tensors, self.evidence, self.criterion = tensors, evidence, criterion
        self.reduction, self.normalise = reduction, normalise
        self._sums: dict[Place, Tensor | None] = {}

    def __call__(self, family: Family) -> Tensor:
        """Scores of the family's units, `[U]`; the lowest go first.

        Raises:
            UnsupportedError: if the criterion says nothing about any place of the family.
            NonFiniteError: naming the parameter whose scores hold NaN or Inf.
        """
        if self.criterion.units is not None:
            return self._normalised(self.criterion.units(family), 1)
        scores, owned = [], 0
        for place, members in family.members.items():
            if place.parameter not in self.tensors or not members.numel():
                continue
            sums = self._along(place)
            if sums is None:
                continue
            units = sums[members.to(sums.device)].sum(1)
            scores.append(units.square() if self.criterion.terms is not None else units)
            shape = self.tensors[place.parameter].shape
            owned += members.shape[1] * (shape.numel() // shape[place.dim])
        if not scores:
            raise UnsupportedError(
                f"criterion {self.criterion.name!r} says nothing about family {family.name!r} "
                f"({', '.join(map(str, list(family.members)[:4]))} …); choose another criterion, such as 'l1', "
                "or leave the family out"
            )
        device = scores[0].device
        stacked = torch.stack([score.to(device) for score in scores])
        if self.reduction == "max":
            total = stacked.amax(0)
        else:
            total = stacked.sum(0) if self.reduction == "sum" else stacked.mean(0)
        return self._normalised(total, owned)

    def _normalised(self, scores: Tensor, owned: int) -> Tensor:
        if self.normalise == "none":
            return scores
        if self.normalise == "size":
            return scores / max(1, owned)
        size = scores.abs().mean() if self.normalise == "mean" else scores.abs().max()
        return scores / size if bool(size > 0) else scores

    def _along(self, place: Place) -> Tensor | None:
        """Summed scores of each slice of a parameter along the place's dimension; None: nothing is said."""
        place = Place(*place)
        if place not in self._sums:
            weight = self.tensors[place.parameter].detach()
            evidence = self.evidence.get(place.parameter, NOTHING)
            if not weight.is_floating_point() or not has_needs(self.criterion, evidence):
                self._sums[place] = None
            elif self.criterion.slices is not None:
                self._sums[place] = _finite(self.criterion.slices(weight, place.dim, evidence), place.parameter)
            else:
                scores = self._entries(weight, evidence)
                for dim in range(weight.ndim):  # all at once: the scores themselves are not kept
                    others = [other for other in range(weight.ndim) if other != dim]
                    sums = scores.sum(others) if others else scores
                    self._sums[Place(place.parameter, dim)] = _finite(sums, place.parameter)
        return self._sums[place]

    def _entries(self, weight: Tensor, evidence: Evidence) -> Tensor:
        function = self.criterion.terms or self.criterion.entries
        if function is None:
            raise ConfigError(f"criterion {self.criterion.name!r} has no entries, slices or units; give it one of them")
        return function(weight, evidence)


def unit_scores(
    family: Family,
    tensors: Mapping[str, Tensor],
    evidence: Mapping[str, Evidence],
    criterion: Criterion,
    *,
    reduction: Reduction = "mean",
    normalise: Normalise = "mean",
) -> Tensor:
    """Scores of one family's units, `[U]`; see `Scorer`, which is faster for several families."""
    return Scorer(tensors, evidence, criterion, reduction=reduction, normalise=normalise)(family)


def _finite(scores: Tensor | None, parameter: str) -> Tensor | None:
    if scores is None:
        return None
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(f"the scores of {parameter!r} hold NaN or Inf; check the model's weights and the data")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
