"""The report: frozen measurements, each with its unit, count and spread. `report.json` is its serialisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tersor.core.certificate import Certificate
from tersor.core.config import Config
from tersor.core.search import SearchRecord

SCHEMA_VERSION = 1


class Latency(Config):
    """Wall time of one call at the target's batch size, in milliseconds, over all interleaved rounds."""

    median: float = Field(gt=0)
    p95: float
    iqr: float = Field(description="interquartile range")
    n: int = Field(description="number of timed calls")
    best: float = Field(description="fastest call")
    rounds: list[float] = Field(default_factory=list, description="median of each round, in the order of measuring")
    histogram: list[float] = Field(default_factory=list, description="every 1/200 quantile, for drawing")

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range exceeds a tenth of the median."""
        return self.iqr > 0.1 * self.median


class ModelFacts(Config):
    """What was measured on one model in one runtime."""

    metric: float | None = Field(description="value on the report split; None without one")
    metric_name: str
    size_bytes: int = Field(description="bytes on disk of the files that the runtime loads")
    parameters: int
    nonzero_parameters: int
    macs: int = Field(description="dense multiply-accumulates of one call at batch 1")
    latency_ms: Latency | None
    runtime: str
    precision: str
    peak_memory_bytes: int | None = Field(
        default=None, description="peak resident memory above an idle process, loading included"
    )
    throughput: float | None = Field(default=None, description="examples per second at the target's batch")


class Ratios(Config):
    """Baseline divided by deployed: above 1 is better."""

    size: float
    latency: float | None = Field(description="against PyTorch eager, paired by round")
    latency_same_runtime: float | None = Field(
        description="against the uncompressed model in the same runtime, paired by round"
    )
    macs: float


class ClassChange(Config):
    """Accuracy of one class before and after."""

    name: str
    n: int
    before: float
    after: float


class Changes(Config):
    """What changed for the people who use the model, on the report split."""

    n: int
    flips: int = Field(description="examples whose predicted class changed")
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    per_class: list[ClassChange] = Field(default_factory=list)
    calibration_error_before: float | None = Field(
        default=None, description="expected calibration error, 15 equal-width bins"
    )
    calibration_error_after: float | None = None


class Layer(Config):
    """One row of the per-layer table."""

    name: str
    kind: str
    parameters: int
    nonzero_parameters: int
    macs: int
    precision: str
    weight_error: float | None = Field(
        default=None, description="relative L2 error of the deployed weight against the original"
    )


class Coverage(Config):
    """Which share of the model the methods touched, in 0..1."""

    parameters_quantized: float
    macs_quantized: float
    parameters_pruned: float = Field(description="of the original's: cut out, or zero by mask")
    float_operators: list[str] = Field(
        default_factory=list, description="operators that still compute in float, with their count"
    )


class Environment(Config):
    """Where and when it was measured."""

    machine: str
    cpu: str
    cpu_flags: list[str]
    cores: int
    threads: int
    system: str
    python: str
    versions: dict[str, str]
    date: str
    seed: int


class PrunedFamily(Config):
    """Units that go one by one, each with everything that must go with it."""

    name: str
    kind: str
    units: int
    kept: int
    layers: list[str] = Field(default_factory=list, description="modules that the units are part of")


class FrozenPart(Config):
    """What structured pruning had to leave whole, and why."""

    name: str
    reason: str


class Pruning(Config):
    """What structured pruning found and did."""

    parameters_before: int
    parameters_after: int
    macs_before: int = Field(description="of one call at batch 1")
    macs_after: int
    amount: float = Field(description="share of the units that went, after floors and rounding")
    coverage: float = Field(description="share of the parameters that some family touches")
    families: list[PrunedFamily]
    frozen: list[FrozenPart] = Field(default_factory=list)
    unused: list[str] = Field(default_factory=list, description="parameters that the examples never reached")
    max_error: float | None = Field(description="largest relative difference from the masked model; None: not verified")
    layers: list[str] = Field(default_factory=list, description="modules with parameters of their own, in order")


class QuantizedLayer(Config):
    """Widths of one layer, and what they were chosen by."""

    name: str
    parameters: int
    macs: int = Field(description="of one call at batch 1")
    weight_bits: int = Field(description="32: float")
    activation_bits: int | None = Field(default=None, description="of its input; None: float, or no input to round")
    losses: list[float] = Field(
        default_factory=list, description="if this layer alone is rounded, at each of the widths; empty: not measured"
    )


class QuantizationRecord(Config):
    """Which layer got how many bits."""

    measure: str | None = Field(default=None, description="what the losses are; None: not measured")
    widths: list[int] = Field(default_factory=list, description="bits at which the losses were measured")
    layers: list[QuantizedLayer] = Field(description="in the order of the model")

    @property
    def average_bits(self) -> float:
        """Bits per parameter of these layers, scales left out."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.weight_bits * layer.parameters for layer in self.layers) / max(total, 1)


class StepRecord(Config):
    """What a step did, for the history."""

    name: str
    settings: dict[str, object]
    seconds: float
    notes: list[str] = Field(default_factory=list)
    pruning: Pruning | None = Field(default=None, description="of steps that remove whole units")
    quantization: QuantizationRecord | None = Field(default=None, description="of steps that round layer by layer")


class Elsewhere(Config):
    """Latency of the deployed model on another machine, as a bench kit measured it there on inputs of its signature."""

    machine: str
    cpu: str
    cores: int
    system: str
    runtime_version: str = Field(description="name and version of the runtime")
    date: str
    threads: int
    batch: int
    latency: Latency
    peak_memory_bytes: int | None = None


class Report(Config):
    """All numbers of one run. Ratios are baseline / deployed."""

    schema_version: int = SCHEMA_VERSION
    name: str
    verdict: Literal["certified", "not certified", "no certificate"]
    warnings: list[str] = Field(default_factory=list)
    baseline: ModelFacts
    runtime_baseline: ModelFacts
    deployed: ModelFacts
    ratios: Ratios
    certificate: Certificate | None
    changes: Changes | None
    coverage: Coverage
    layers: list[Layer]
    size_breakdown: dict[str, int] = Field(description="bytes by file of the deployed model")
    environment: Environment
    recipe: dict[str, object]
    target: dict[str, object]
    budget: dict[str, object]
    history: list[StepRecord]
    search: SearchRecord | None = Field(default=None, description="what chose the recipe; None: it was given")
    elsewhere: list[Elsewhere] = Field(default_factory=list, description="measured on other machines by a bench kit")
