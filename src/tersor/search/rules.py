"""The advisor's rules and measurements, read from `advice.yaml` and checked strictly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, StringConstraints, model_validator

from tersor.core.config import Config
from tersor.errors import ConfigError
from tersor.recipes import preset_names
from tersor.search.family import FamilyName, Profile

Scenario = Literal["edge", "server", "constrained", "gpu"]
Instructions = Literal["vnni", "amx_int8", "amx_bf16", "avx512_bf16", "i8mm", "bf16", "cuda"]
Format = Literal[
    "float32", "float16-weights", "bfloat16-weights", "int8", "int4", "int8-dynamic", "int8-weights", "int4-weights"
]
Ability = Instructions | Format
Source = Annotated[str, StringConstraints(pattern=r"^(https://|docs/|benchmarks/)\S+$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
LISTED: Any = Field(default=(), strict=False)  # YAML has lists


class When(Config):
    """A condition; what is left out is no condition.

    Attributes:
        family: One of these.
        scenario: One of these.
        runtime: One of these.
        abilities: The target has all of these.
        lacks: The target has none of these.
        parameters_at_least: The model has so many.
        recurrent_at_least: This share of the multiply-accumulates is in recurrent layers.
    """

    family: tuple[FamilyName, ...] = LISTED
    scenario: tuple[Scenario, ...] = LISTED
    runtime: tuple[str, ...] = LISTED
    abilities: tuple[Ability, ...] = LISTED
    lacks: tuple[Ability, ...] = LISTED
    parameters_at_least: int = Field(default=0, ge=0)
    recurrent_at_least: float = Field(default=0.0, ge=0, le=1)

    def holds(self, found: Profile, scenario: Scenario, runtime: str, abilities: frozenset[str]) -> bool:
        """Whether the condition is met."""
        return (
            (not self.family or found.family in self.family)
            and (not self.scenario or scenario in self.scenario)
            and (not self.runtime or runtime in self.runtime)
            and abilities.issuperset(self.abilities)
            and abilities.isdisjoint(self.lacks)
            and found.parameters >= self.parameters_at_least
            and found.recurrent >= self.recurrent_at_least
        )


class Quoted(Config):
    """A number as it stands in a benchmark's file, and the keys that lead to it there."""

    value: float
    at: tuple[str | int, ...] = Field(min_length=1, strict=False)


class Measured(Config):
    """One row of this project's own benchmarks.

    Attributes:
        name: Of the row.
        family: Of the model that was measured.
        preset: That was measured; None for a row that only a method that is ruled out quotes.
        runtime: Where; None: in PyTorch, before it was deployed.
        source: The benchmark's file.
        model: What was measured, on which data.
        conditions: Batch, threads, and what differs from the preset.
        vnni: Whether the processor had VNNI instructions.
        drop: Of the metric, as a share (0.01 is a point); or `drop_points`.
        drop_points: Of the metric in points.
        loss: In `loss_unit`, where the metric is not a share of examples.
        loss_unit: Of `loss`.
        float_ms: Median latency of the float model in the same runtime.
        ms: Likewise of what the preset made.
        float_bytes: Size of the float model's file.
        bytes: Likewise of what the preset made.
    """

    name: Text
    family: FamilyName
    preset: str | None
    runtime: str | None
    source: Annotated[str, StringConstraints(pattern=r"^benchmarks/results/\w+\.json$")]
    model: Text
    conditions: Text
    vnni: bool
    drop: Quoted | None = None
    drop_points: Quoted | None = None
    loss: Quoted | None = None
    loss_unit: str | None = None
    float_ms: Quoted | None = None
    ms: Quoted | None = None
    float_bytes: Quoted | None = None
    bytes: Quoted | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for one, other in (("float_ms", "ms"), ("float_bytes", "bytes"), ("loss", "loss_unit")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{self.name}: {one} and {other} belong together")
        if self.drop is not None and self.drop_points is not None:
            raise ValueError(f"{self.name}: expected either drop or drop_points")
        if not self.quoted:
            raise ValueError(f"{self.name}: no number is quoted")
        return self

    @property
    def quoted(self) -> list[Quoted]:
        """All of its numbers."""
        return [
            value for value in (getattr(self, name) for name in type(self).model_fields) if isinstance(value, Quoted)
        ]

    @property
    def points(self) -> float | None:
        """The drop in points."""
        if self.drop_points is not None:
            return self.drop_points.value
        return None if self.drop is None else 100 * self.drop.value

    def told(self, *, vnni: bool) -> str:
        """One sentence with every number.

        Args:
            vnni: Whether the processor here has VNNI.
        """
        parts = []
        if self.ms is not None and self.float_ms is not None:
            was, now = self.float_ms.value, self.ms.value
            parts.append(f"median {was:.3g} -> {now:.3g} ms ({was / now:.2f}x as fast)")
        if self.bytes is not None and self.float_bytes is not None:
            was, now = self.float_bytes.value, self.bytes.value
            parts.append(f"{was / 1000:,.0f} -> {now / 1000:,.0f} kB ({was / now:.2f}x smaller)")
        if self.points is not None:
            parts.append(f"drop {self.points:+.2f} points")
        if self.loss is not None:
            parts.append(f"loss {self.loss.value:+.4f} {self.loss_unit}")
        place = "PyTorch" if self.runtime is None else self.runtime
        differs = self.ms is not None and self.vnni != vnni
        other = f"; measured with{'' if self.vnni else 'out'} VNNI, unlike this processor" if differs else ""
        return f"{self.model}, {place}, {self.conditions}: {', '.join(parts)} [{self.source}]{other}"


class Rule(Config):
    """A preset, when to take it, and why."""

    name: Text
    when: When
    preset: str
    because: Text
    source: tuple[Source, ...] = Field(min_length=1, strict=False)


class Exclusion(Config):
    """A method that is not advised, when, and why; `measured` names rows that show it."""

    method: Text
    when: When = Field(default_factory=When)
    because: Text
    source: tuple[Source, ...] = Field(min_length=1, strict=False)
    measured: tuple[str, ...] = LISTED


class Rules(Config):
    """The whole of `advice.yaml`; the first rule that fits wins."""

    rules: tuple[Rule, ...] = Field(min_length=1, strict=False)
    ruled_out: tuple[Exclusion, ...] = LISTED
    measured: tuple[Measured, ...] = LISTED

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known, names = set(preset_names()), [item.name for item in self.measured] + [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names must be different, {twice} are not")
        for name in (rule.preset for rule in self.rules):
            if name not in known:
                raise ValueError(f"expected a preset of {sorted(known)}, got {name!r}")
        for item in self.measured:
            if item.preset is not None and item.preset not in known:
                raise ValueError(f"{item.name}: expected a preset of {sorted(known)}, got {item.preset!r}")
        missing = sorted({name for item in self.ruled_out for name in item.measured} - set(self.by_name))
        if missing:
            raise ValueError(f"ruled_out quotes {missing}, which are not measured")
        last = self.rules[-1]
        if last.when != When() or last.preset != "convert":
            raise ValueError("the last rule must fit always and do nothing but convert, so that there is an answer")
        return self

    @cached_property
    def by_name(self) -> dict[str, Measured]:
        """Measured rows by name."""
        return {item.name: item for item in self.measured}

    def measurements(self, family: FamilyName, preset: str, runtime: str) -> list[Measured]:
        """What was measured of a preset on models of this family, in this runtime or before deployment."""
        fitting = [item for item in self.measured if (item.family, item.preset) == (family, preset)]
        return [item for item in fitting if item.runtime in (runtime, None)]


def parse_rules(text: str, where: str = "advice") -> Rules:
    """Reads rules from YAML.

    Raises:
        ConfigError: for malformed YAML, unknown keys, families, scenarios, abilities or presets, saying where.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{where}: expected a mapping with {list(Rules.model_fields)}, got {type(data).__name__}")
    try:
        return Rules(**data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@cache
def read_rules() -> Rules:
    """The rules that come with tersor."""
    return parse_rules((files("tersor.search") / "advice.yaml").read_text(encoding="utf-8"), "advice.yaml")
