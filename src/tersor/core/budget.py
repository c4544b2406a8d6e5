"""What may be lost, and what is wanted for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tersor.core.config import Config


class Budget(Config):
    """The largest acceptable drop of the metric, and how sure one must be of it.

    `max_drop` is in units of the metric (0.01 = one point of accuracy); None compresses without a certificate.
    `minimise` names what the result is judged by: one that is not better in it than the uncompressed model in
    the same runtime is reported as such, never as a success. `rounds` is how many interleaved rounds of latency
    measurement are run. `minutes` is the time that ``recipe="auto"`` may search; None: it takes a preset.
    """

    max_drop: float | None = Field(default=0.01, ge=0)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    minimise: Literal["latency", "size"] = "latency"
    rounds: int = Field(default=12, ge=1)
    minutes: float | None = Field(default=None, gt=0)
