"""What structured pruning can be asked for, and which units then go.

Shapes: `U` units of a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from tersor.core.config import Config
from tersor.errors import ConfigError
from tersor.graph import Family
from tersor.graph.coupling.family import Kind
from tersor.probe import Need
from tersor.prune import criteria
from tersor.prune.allocation import below, erk, global_ranking, per_layer, spare, uniform
from tersor.prune.criteria.base import Criterion
from tersor.prune.scoring import Normalise, Reduction

DEFAULT_AMOUNT = 0.5
Share = Annotated[float, Field(ge=0, lt=1)]
Goal = Literal["macs", "parameters", "bytes"]


def _known(name: str) -> str:
    if name not in criteria.__all__:
        raise ConfigError(f"criterion: expected one of {criteria.__all__}, got {name!r}")
    return name


class Structure(Config):
    """How many units go, chosen how. At most one of `amount`, `target` and `threshold`.

    Attributes:
        amount: Share of the units that goes, in [0, 1); 0.5 where nothing else decides.
        target: `macs`, `parameters` or `bytes` to get down to: a share of the original up to 1, above that a number.
        threshold: All units that score less go; choose `normalise="none"` to compare raw scores.
        criterion: A name from `prune.criteria`; the lowest scores go.
        reduction: How a unit's scores at several places become one.
        normalise: What makes families comparable under `global`; see `scoring`. `cost`: the score over what the unit
            saves of the `target`, as in a knapsack (Shen et al. 2021, https://arxiv.org/abs/2110.10811).
        allocation: `uniform` takes the same share of every family, `global` ranks all units together, `erk` takes
            more of the large ones; or amounts by glob pattern of family names (the others lose nothing).
        floor: Share of every family that stays, so that no layer dies.
        round_to: What stays of a family becomes a multiple of this, where that fits: odd widths are slow.
        kinds: Only these kinds of units.
        exclude: Glob patterns of family names that stay whole.
        rounds: Prunes in so many steps, scoring and refitting anew in each.
        compensate: Refits the weights behind what goes by least squares on data (Hassibi & Stork 1992).
        verify: `full` checks every family alone and all together; `together` only all; `off` none.
        seed: Of the verification.
    """

    amount: Share | None = None
    target: dict[Goal, Annotated[float, Field(gt=0)]] | None = None
    threshold: float | None = None
    criterion: Annotated[str, AfterValidator(_known)] = "l2"
    reduction: Reduction = "mean"
    normalise: Normalise | Literal["cost"] = "mean"
    allocation: Literal["uniform", "global", "erk"] | dict[str, Share] = "uniform"
    floor: Share = 0.1
    round_to: int = Field(default=1, ge=1)
    kinds: tuple[Kind, ...] = Field(default=("channel", "head", "hidden", "width"), strict=False)  # YAML has lists
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    rounds: int = Field(default=1, ge=1)
    compensate: bool = False
    verify: Literal["full", "together", "off"] = "full"
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Structure:
        given = [name for name in ("amount", "target", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of amount, target and threshold, got {given}")
        if self.target is not None and len(self.target) != 1:
            raise ValueError(f"expected one target, got {list(self.target)}")
        if self.rounds > 1 and (self.threshold is not None or isinstance(self.allocation, dict)):
            raise ValueError("rounds divide an amount or a target: leave threshold and amounts by family out")
        if isinstance(self.allocation, dict) and given:
            raise ValueError(f"amounts by family leave no room for {given[0]}")
        return self

    def step(self, number: int, whole: float) -> Structure:
        """What round `number`, counted from 1, removes, so that all together remove what was asked.

        Args:
            number: Of the round.
            whole: What the target counts, for the model as it was.
        """
        if self.rounds == 1:
            return self
        update: dict[str, object] = {"rounds": 1, "verify": self.verify if number == 1 else "together"}
        if self.verify == "off":
            update["verify"] = "off"
        if self.target is not None:
            ((goal, value),) = self.target.items()
            limit = value * whole if value <= 1 else value
            update["target"] = {goal: max(1.0 + 1e-9, whole - (whole - limit) * number / self.rounds)}
        else:
            amount = DEFAULT_AMOUNT if self.amount is None else self.amount
            update["amount"] = 1 - (1 - amount) ** (1 / self.rounds)
        return self.model_copy(update=update)

    @property
    def criterion_(self) -> Criterion:
        """The criterion itself."""
        found: Criterion = getattr(criteria, self.criterion)
        return found

    @property
    def needs_evidence(self) -> frozenset[Need]:
        """What must be measured on data."""
        return self.criterion_.needs | ({"gram"} if self.compensate else frozenset())

    def wants(self, family: Family) -> str:
        """Why a family stays whole; empty if it may be cut."""
        if family.kind not in self.kinds:
            return f"units of kind {family.kind!r} were not asked for"
        if any(fnmatchcase(family.name, pattern) for pattern in self.exclude):
            return "excluded"
        if family.size < 2:
            return "it is one unit: nothing would stay"
        return ""


def choose(
    families: Sequence[Family], scores: Mapping[str, Tensor], settings: Structure, amount: float
) -> dict[str, Tensor]:
    """Family name -> numbers of the units that go, ascending; families that stay whole are left out.

    Args:
        families: That may be cut.
        scores: Of their units, `[U]` each.
        settings: How to allocate and round.
        amount: Share of the units that goes, where `settings` leaves it open.
    """
    sizes = {family.name: family.size for family in families}
    if settings.threshold is not None:
        shares = below(scores, settings.threshold, settings.floor)
    elif isinstance(settings.allocation, dict):
        shares = per_layer(sizes, settings.allocation, floor=settings.floor)
    elif settings.allocation == "global":
        shares = global_ranking(scores, amount, settings.floor)
    elif settings.allocation == "erk":
        shapes = {family.name: (family.size, len(family.members)) for family in families}
        shares = erk(shapes, amount, settings.floor)
    else:
        shares = uniform(sizes, amount, settings.floor)
    removed: dict[str, Tensor] = {}
    for family in families:
        count = rounded(family, min(round(shares[family.name] * family.size), spare(family.size, 0)), settings)
        if count:
            order = scores[family.name].argsort(stable=True)
            removed[family.name] = order[:count].sort().values
    return removed


def rounded(family: Family, count: int, settings: Structure) -> int:
    """How many units go so that the rest is a multiple of `round_to`; heads are counted as they are."""
    step = settings.round_to
    if step == 1 or not count or family.kind == "head" or family.size < step:
        return count
    kept = max(step, round((family.size - count) / step) * step)
    return max(0, family.size - kept)
