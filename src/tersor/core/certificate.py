"""The certificate: what is proven about the accuracy drop, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tersor.core.config import Config

Method = Literal["exact-paired", "clopper-pearson", "betting", "paired-bootstrap"]


class Certificate(Config):
    """A one-sided upper confidence bound on the mean paired drop (reference score - candidate score).

    Drops and bounds are in units of the metric (0.01 = one point of accuracy); positive means worse.
    """

    max_drop: float = Field(ge=0, description="the budget: the largest drop that is acceptable")
    confidence: float = Field(gt=0, lt=1, description="what is promised, over all runs that ever ask this split")
    level: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="confidence of this single test, after what earlier questions spent; None: nothing was spent",
    )
    drop: float = Field(description="observed mean drop on the certify split")
    upper_bound: float = Field(description="with probability `level`, else `confidence`, the true drop is below this")
    n: int = Field(ge=1, description="number of examples")
    method: Method
    certified: bool = Field(description="upper_bound <= max_drop")
    exact: bool = Field(description="False: approximate (bootstrap), no finite-sample guarantee")
    measures: Literal["metric", "agreement"] = "metric"
    losses: int | None = Field(default=None, ge=0, description="examples right before and wrong after")
    gains: int | None = Field(default=None, ge=0, description="examples wrong before and right after")
    times_asked: int = Field(default=1, ge=1, description="runs that have asked this split, this one included")
    split_fingerprint: str | None = None
    examples_needed: int | None = Field(
        default=None, description="examples that would certify the observed flip rates, when not certified"
    )
