"""The terms of a distillation's loss, as recipes write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tersor.core.config import Config
from tersor.distill.losses import LOSSES, check

TASK = "task"
EXAMPLE = "{kd: {weight: 0.9, temperature: 2}}"


class Term(Config):
    """One loss with its weight: `kd`, `{kd: {weight: 0.9, temperature: 2}}`, or all fields by name.

    Attributes:
        loss: A name from `tersor.distill.losses`, or `task`, the task's own loss on the labels.
        weight: Factor in the sum.
        settings: The loss's own settings.
        pairs: For losses on features: addresses in student and teacher (see `tersor.probe.Outputs`); empty for those
            that are proposed.
    """

    loss: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    settings: dict[str, Any] = Field(default_factory=dict)
    pairs: tuple[Annotated[tuple[str, str], Field(strict=False)], ...] = Field(default=(), strict=False)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"loss": data}
        if not isinstance(data, Mapping) or "loss" in data:
            return data
        if len(data) != 1:
            raise ValueError(f"expected one term, such as {EXAMPLE}, and each in an entry of its own; got {dict(data)}")
        ((name, given),) = data.items()
        if not isinstance(given, Mapping | None):
            raise ValueError(f"expected settings of {name!r}, such as {EXAMPLE}, got {given!r}")
        fields = dict(given or {})
        own = {key: fields.pop(key) for key in ("weight", "pairs") if key in fields}
        return {"loss": name, "settings": fields, **own}

    @model_validator(mode="after")
    def _known(self) -> Term:
        if self.loss == TASK:
            if self.settings or self.pairs:
                raise ValueError("the task's loss has neither settings nor pairs")
            return self
        check(self.loss, self.settings)
        if self.pairs and not self.on_features:
            raise ValueError(f"{self.loss} compares outputs; pairs are for losses on features")
        return self

    @property
    def on_features(self) -> bool:
        """Whether it compares activations of layers."""
        return self.loss != TASK and LOSSES[self.loss].on == "features"


def _as_terms(value: Any) -> Any:
    if isinstance(value, str | Mapping | Term):
        value = [value]
    if isinstance(value, Sequence):
        for item in value:
            if isinstance(item, Mapping) and not all(isinstance(key, str) for key in item):
                raise ValueError(f"expected terms such as {EXAMPLE}")
        return tuple(item if isinstance(item, Term) else Term.model_validate(item) for item in value)
    return value


Terms = Annotated[tuple[Term, ...], BeforeValidator(_as_terms), Field(min_length=1)]
STANDARD: tuple[Term, ...] = (Term(loss="kd", weight=0.9), Term(loss=TASK, weight=0.1))


class Losses(Config):
    """What a training minimises: the weighted sum of its terms."""

    losses: Terms = STANDARD

    @field_validator("losses")
    @classmethod
    def _once(cls, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        kinds = [(term.loss, term.settings, term.pairs) for term in terms]
        twice = sorted({kind[0] for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: there twice in the same form; add the weights up, or name other settings or pairs"
            )
        return terms
