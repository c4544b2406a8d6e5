"""What a search found, as it goes into the report: tables, trials, front, ladder."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field

from tersor.core.config import Config

Source = Literal["preset", "program", "sampler", "once-for-all"]
Pair = Annotated[tuple[str, str, float], Field(strict=False)]  # JSON has lists
Status = Literal["finished", "failed", "timeout", "out of memory", "killed", "not finite"]


class Choice(Config):
    """One point of a search space: which blocks go, how many units of a family stay, in which number format.

    `widths` names families that lose units; all others stay whole.
    """

    skipped: tuple[str, ...] = Field(default=(), strict=False)
    widths: dict[str, int] = Field(default_factory=dict)
    format: str = "float32"

    @property
    def key(self) -> str:
        """Short hash; equal choices have equal keys, in whatever order they were written down."""
        widths = sorted(self.widths.items())
        return hashlib.sha256(repr((sorted(self.skipped), widths, self.format)).encode()).hexdigest()[:16]


class CostPoint(Config):
    """A whole model whose latency was measured, and what the table says of it."""

    choice: Choice
    measured_ms: float = Field(gt=0)
    predicted_ms: float
    size_bytes: int
    macs: int
    fitted: bool = Field(description="whether the table was fitted on this point; False: it was predicted before")


class CostRecord(Config):
    """What layers cost in one number format on the target, from whole models by non-negative least squares."""

    format: str
    constant_ms: float = Field(description="of one call, whatever is left of the model")
    layers: dict[str, float] = Field(description="layer -> milliseconds while all of its units are there")
    points: list[CostPoint]

    def error(self, *, fitted: bool) -> float | None:
        """Median relative error of the prediction, on fitted or on other points; None without any."""
        errors = sorted(abs(p.predicted_ms / p.measured_ms - 1) for p in self.points if p.fitted is fitted)
        if not errors:
            return None
        middle = len(errors) // 2
        return errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2


class DamageRow(Config):
    """What one decision does alone, before any training."""

    name: str = Field(description="a block, or a family of units")
    kind: str
    options: list[int] = Field(description="units that stay; of a block 1 or 0")
    damages: list[float] = Field(description="rise of the loss at each option, in the unit of the table")


class DamageRecord(Config):
    """Damages of single decisions, and of pairs beyond the sum of their parts."""

    measure: str = Field(description="what the damages are")
    rows: list[DamageRow]
    pairs: list[Pair] = Field(
        default_factory=list, description="two decisions at their strongest option, damage beyond the sum"
    )


class TrialRecord(Config):
    """One trial: what was done, predicted and measured."""

    number: int
    choice: Choice
    rung: int = Field(description="0 for the shortest training")
    source: Source
    status: Status
    reason: str = ""
    recipe: dict[str, object] = Field(default_factory=dict)
    drop: float | None = Field(default=None, description="of the metric on the search split, original - deployed")
    drop_bound: float | None = Field(default=None, description="upper confidence bound of the drop on that split")
    latency_ms: float | None = None
    predicted_drop: float | None = None
    predicted_ms: float | None = None
    size_bytes: int | None = None
    macs: int | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    date: str = ""


class LadderStep(Config):
    """One question to the certify split: a candidate, tested in a fixed order until the first that fails."""

    trial: int
    latency_ms: float
    search_drop: float
    certify_drop: float
    upper_bound: float
    certified: bool


class Ladder(Config):
    """Fixed-sequence testing along the front: candidates in an order that was fixed before the certify split was seen.

    All are tested at the same confidence until the first that fails; what passed before holds at that confidence for
    all of them together (Laufer-Goldshtein et al. 2023, https://arxiv.org/abs/2210.07913).
    """

    confidence: float = Field(description="that was asked for, over all runs that ever ask this split")
    spent: float = Field(description="confidence of each test of this run, after what the ledger had spent before")
    times_asked: int
    steps: list[LadderStep]
    untested: list[int] = Field(default_factory=list, description="trials behind the first failure")


class SearchRecord(Config):
    """Everything that a search leaves behind, beside the artifact."""

    minutes: float = Field(description="that were allowed")
    seconds: float = Field(description="that it took")
    seed: int
    method: str
    original_metric: float = Field(description="of the original on the search split")
    baseline_ms: float | None = Field(default=None, description="of the uncompressed model on the target")
    decisions: int = Field(description="blocks and families that could go")
    frozen: list[str] = Field(default_factory=list, description="what could not, and why")
    costs: list[CostRecord] = Field(default_factory=list)
    damages: DamageRecord | None = None
    trials: list[TrialRecord] = Field(default_factory=list)
    front: list[int] = Field(default_factory=list, description="numbers of trials that no other beats in both")
    ladder: Ladder | None = None
    chosen: int | None = None
    notes: list[str] = Field(default_factory=list)
