"""What unstructured pruning can be asked for, and what must be measured for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.core.split import Split
from tersor.errors import ConfigError
from tersor.probe import Evidence, Need, collect
from tersor.prune import criteria
from tersor.prune.criteria.base import Criterion
from tersor.prune.patterns import Pattern, pattern_of

DEFAULT_AMOUNT = 0.5
BATCH_SIZE = 32
FROM_LOSS: frozenset[Need] = frozenset({"gradient", "squared_gradient", "movement"})


def criterion_of(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: if there is none, or it judges whole channels only.
    """
    if name not in criteria.__all__:
        raise ConfigError(f"criterion: expected one of {criteria.__all__}, got {name!r}")
    found: Criterion = getattr(criteria, name)
    if found.entries is None:
        single = [other for other in criteria.__all__ if getattr(criteria, other).entries is not None]
        raise ConfigError(f"criterion: {name!r} judges whole channels; for single weights expected one of {single}")
    return found


def _known_criterion(name: str) -> str:
    criterion_of(name)
    return name


def _known_pattern(name: str) -> str:
    pattern_of(name)
    return name


CriterionName = Annotated[str, AfterValidator(_known_criterion)]
PatternName = Annotated[str, AfterValidator(_known_pattern)]
Share = Annotated[float, Field(ge=0, lt=1)]
Allocation = Literal["global", "uniform", "output", "erk"] | dict[str, Share]
Reconstruction = Literal["obc", "sparsegpt"]


class Sparsity(Config):
    """How much goes, in which pattern, chosen how.

    Attributes:
        amount: Share of the weights that goes, in [0, 1). Earlier rounds count. N:M patterns have their own.
        threshold: Instead of an amount: all that scores less goes.
        criterion: A name from `prune.criteria`; the lowest scores go.
        pattern: `unstructured`, `N:M` (`2:4`: two of every four inputs stay), or blocks `4x1` (outputs x inputs).
        allocation: `global` ranks all layers together, `uniform` takes the same share of each, `output` the same
            share of every output in each, `erk` more of the large ones; or amounts by glob pattern of parameter
            paths (the others lose `amount`, or nothing).
        floor: Share of every weight tensor that stays, so that no layer dies.
        reconstruct: Repairs what is left by `obc` or `sparsegpt`, which then choose within each layer themselves;
            the criterion only allocates.
    """

    amount: Share | None = None
    threshold: float | None = None
    criterion: CriterionName = "l1"
    pattern: PatternName = "unstructured"
    allocation: Allocation = "global"
    floor: Share = 0.01
    reconstruct: Reconstruction | None = None

    @model_validator(mode="after")
    def _fits(self) -> Sparsity:
        pattern = self.pattern_
        if self.threshold is not None and self.amount is not None:
            raise ValueError("expected either an amount or a threshold, not both")
        if self.threshold is not None and (self.allocation != "global" or self.reconstruct is not None):
            raise ValueError("a threshold decides how much goes of each layer: leave allocation and reconstruct out")
        if pattern.share is not None:
            if self.threshold is not None or self.allocation != "global":
                raise ValueError(
                    f"pattern {pattern.name} fixes every layer's share: leave threshold and allocation out"
                )
            if self.amount is not None and abs(self.amount - pattern.share) > 1e-9:
                raise ValueError(f"pattern {pattern.name} always removes {pattern.share:g}: leave the amount out")
        if self.allocation == "output" and (self.pattern != "unstructured" or self.reconstruct is not None):
            raise ValueError("allocation output ranks single weights: leave pattern and reconstruct out")
        if self.reconstruct is not None and pattern.size != (1, 1):
            raise ValueError(f"{self.reconstruct} repairs single weights and N:M, not blocks {pattern.name}")
        return self

    @property
    def pattern_(self) -> Pattern:
        """The pattern itself."""
        return pattern_of(self.pattern)

    @property
    def share(self) -> float:
        """The amount, with its default."""
        return DEFAULT_AMOUNT if self.amount is None else self.amount

    @property
    def needs(self) -> frozenset[Need]:
        """What must be measured on data."""
        wanted = criterion_of(self.criterion).needs
        return wanted if self.reconstruct is None else wanted | {"gram"}


def measure(
    model: nn.Module,
    settings: Sparsity,
    data: Any = None,
    loss: Callable[[Any, Tensor | None], Tensor] | None = None,
) -> dict[str, Evidence]:
    """Everything that `settings` needs to know about the weights of `model`, which stays as it is.

    Args:
        model: The model.
        settings: What will be pruned.
        data: A split, one batch (a tensor, a tuple or a dict), or an iterable of batches.
        loss: `(outputs, labels) -> scalar`.

    Raises:
        ConfigError: if data or a loss is missing.
    """
    needs = settings.needs
    who = f"criterion {settings.criterion!r}"
    if settings.reconstruct is not None and not criterion_of(settings.criterion).needs:
        who = f"reconstruct {settings.reconstruct!r}"
    if needs and data is None:
        raise ConfigError(
            f"{who} is measured on data ({', '.join(sorted(needs))}), but there is none; pass data=..., batches of "
            "examples" + (", and loss=..., a function (outputs, labels) -> scalar" if needs & FROM_LOSS else "")
        )
    if needs & FROM_LOSS and loss is None:
        raise ConfigError(f"{who} is taken from gradients; pass loss=..., a function (outputs, labels) -> scalar")
    paths = [path for path, weight in model.named_parameters() if weight.ndim >= 2 and weight.is_floating_point()]
    return collect(model, batches_of(data) if needs else (), needs=needs, loss=loss, parameters=paths)


def batches_of(data: Any) -> Iterable[Any]:
    """Batches from a split, one batch (a tensor, a tuple or a dict), or an iterable of batches."""
    if isinstance(data, Split):
        return data.batches(BATCH_SIZE)
    return [data] if isinstance(data, Tensor | tuple | dict | Batch) else data
