"""Measures original and deployed model side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from pathlib import Path

from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.certificate import Certificate
from tersor.core.context import Progress
from tersor.core.files import sha256
from tersor.core.report import ModelFacts, Ratios
from tersor.core.split import Split
from tersor.errors import ConfigError
from tersor.measure import (
    Contestant,
    Evaluation,
    Protocol,
    certify,
    certify_metric,
    evaluate,
    file_bytes,
    latency,
    mac_counts,
    paired_ratio,
    parameter_counts,
)
from tersor.measure.accuracy import score_bounds, scores
from tersor.measure.certificate import RESAMPLED_UP_TO
from tersor.measure.latency import Measured
from tersor.measure.ledger import NAME, ask, level_of
from tersor.pipeline.plan import Plan
from tersor.runtimes import Loaded
from tersor.runtimes.eager import Eager, TorchSession

EVALUATION_BATCH = 64
RESAMPLES = 1000  # of a metric over all examples, at least


@dataclass(frozen=True)
class Exported:
    """Model files in a directory, and how to open them."""

    loaded: Loaded
    candidate: Candidate
    files: tuple[Path, ...]


def export(plan: Plan, candidate: Candidate, directory: Path) -> Exported:
    """Writes the candidate for the plan's runtime into an existing directory."""
    example = plan.task.example(2)
    files = plan.runtime.export(candidate, example, directory, signature=plan.signature, target=plan.target)
    return Exported(loaded_from(plan, candidate, directory), candidate, tuple(files))


def loaded_from(plan: Plan, candidate: Candidate, directory: Path) -> Loaded:
    """How to open what `export` wrote of a candidate."""
    model = partial(_as_is, candidate.module) if plan.runtime.needs_code else None
    return Loaded(plan.runtime, directory, plan.signature, plan.target, model)


def _as_is(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Compared:
    """Original and deployed model on one split."""

    original: Evaluation
    deployed: Evaluation


def evaluate_original(plan: Plan, split: Split, progress: Progress) -> Evaluation:
    """Evaluates the caller's model, in PyTorch."""
    return evaluate(
        plan.original,
        split,
        plan.task.metric,
        batch_size=EVALUATION_BATCH,
        select=plan.task.output,
        against="itself" if plan.task.metric.against_original else None,
        progress=lambda done, total: progress(f"evaluate {split.name}: original", done, total),
    )


def compare(
    plan: Plan, exported: Exported, split: Split, progress: Progress, original: Evaluation | None = None
) -> Compared:
    """Evaluates both; the deployed one through its runtime, at the batch size it will run at.

    Args:
        plan: Of the run.
        exported: The deployed model.
        split: That both are evaluated on.
        progress: Told how far it is.
        original: What `evaluate_original` found, if it is known.
    """
    metric, label = plan.task.metric, f"evaluate {split.name}"
    if original is None:
        original = evaluate_original(plan, split, progress)
    deployed = evaluate(
        exported.loaded(),
        split,
        metric,
        batch_size=plan.target.batch,
        against=original.labels if metric.against_original else None,
        progress=lambda done, total: progress(f"{label}: deployed", done, total),
    )
    return Compared(original, deployed)


def certificate_for(plan: Plan, exported: Exported, run: str, beside: Path, progress: Progress) -> Certificate | None:
    """Asks the certify split, having written so into the ledger first; None without a budget."""
    split, max_drop = plan.task.get("certify"), plan.budget.max_drop
    if split is None or max_drop is None:
        return None
    times_asked = ask(beside / NAME, split=split.fingerprint, run=question(run, [exported.files]))
    level = level_of(plan.budget.confidence, times_asked)
    return certificate_at(plan, compare(plan, exported, split, progress), level=level, times_asked=times_asked)


def question(run: str, models: Sequence[Sequence[Path]]) -> str:
    """What a run asks about: itself, and the very files, in the order of the tests.

    The same call may end in other files where a clock or a device decides; that is another question.
    """
    digest = hashlib.sha256(run.encode())
    for files in models:
        digest.update("".join(sha256(path) for path in sorted(files)).encode() + b";")
    return digest.hexdigest()[:32]


def certificate_at(plan: Plan, compared: Compared, *, level: float, times_asked: int) -> Certificate:
    """The certificate of a run that has asked the certify split, tested at `level`."""
    split, max_drop = plan.task.require("certify", "a certificate"), plan.budget.max_drop
    if max_drop is None:
        raise ConfigError("a certificate needs a budget with max_drop")
    certificate = certify_compared(plan, compared, max_drop, level)
    return certificate.model_copy(
        update={
            "confidence": plan.budget.confidence,
            "level": level,
            "times_asked": times_asked,
            "split_fingerprint": split.fingerprint,
            "measures": "agreement" if plan.task.metric.against_original else "metric",
        }
    )


def certify_compared(plan: Plan, compared: Compared, max_drop: float, level: float) -> Certificate:
    """Tests at the confidence `level`; one that is too high to be told by resampling bounds nothing."""
    metric, told = plan.task.metric, min(level, RESAMPLED_UP_TO)
    if metric.aggregate is not None:
        certificate = certify_metric(
            metric.aggregate,
            compared.original.statistic,
            compared.deployed.statistic,
            compared.original.labels,
            max_drop=max_drop,
            confidence=told,
            higher_is_better=metric.higher_is_better,
            seed=plan.seed,
            resamples=max(RESAMPLES, ceil(told / (1 - told))),
        )
    else:
        certificate = certify(
            scores(compared.original, metric),
            scores(compared.deployed, metric),
            max_drop=max_drop,
            confidence=level,
            bounds=score_bounds(metric),
            agreement=metric.name == "agreement",
            seed=plan.seed,
        )
    if certificate.method == "paired-bootstrap" and told < level:
        return certificate.model_copy(update={"upper_bound": inf, "certified": False})
    return certificate


@dataclass(frozen=True)
class Facts:
    """The three columns of the report."""

    baseline: ModelFacts
    runtime_baseline: ModelFacts
    deployed: ModelFacts
    ratios: Ratios


def measure_facts(
    plan: Plan, deployed: Exported, uncompressed: Exported, scratch: Path, progress: Progress
) -> tuple[Facts, Compared | None]:
    """Latency, memory, size, parameters and the metric of all three."""
    split = plan.task.get("report")
    compared = compare(plan, deployed, split, progress) if split is not None else None
    times = _latencies(plan, deployed, uncompressed, progress)
    weights = Eager().export(
        Candidate(plan.original), plan.task.example(2), scratch, signature=plan.signature, target=plan.target
    )
    before = compared.original.value if compared is not None else None
    after = compared.deployed.value if compared is not None else None
    baseline = _facts(plan, Candidate(plan.original), tuple(weights), times["eager"], before, "eager")
    name = plan.runtime.name
    uncompressed_facts = _facts(plan, uncompressed.candidate, uncompressed.files, times["uncompressed"], before, name)
    deployed_facts = _facts(plan, deployed.candidate, deployed.files, times["deployed"], after, name)
    fast = times["deployed"].latency
    ratios = Ratios(
        size=baseline.size_bytes / deployed_facts.size_bytes,
        latency=paired_ratio(times["eager"].latency, fast),
        latency_same_runtime=paired_ratio(times["uncompressed"].latency, fast),
        macs=baseline.macs / max(deployed_facts.macs, 1),
    )
    return Facts(baseline, uncompressed_facts, deployed_facts, ratios), compared


def _latencies(plan: Plan, deployed: Exported, uncompressed: Exported, progress: Progress) -> dict[str, Measured]:
    preload = (plan.runtime.package,)
    contestants = {
        "eager": Contestant(partial(TorchSession, plan.original, plan.signature, plan.target)),
        "uncompressed": Contestant(uncompressed.loaded, preload),
        "deployed": Contestant(deployed.loaded, preload),
    }
    return latency(
        contestants,
        plan.task.example(plan.target.batch),
        threads=plan.target.threads,
        protocol=Protocol(rounds=plan.budget.rounds),
        progress=lambda done, total: progress("latency rounds", done, total),
    )


def _facts(
    plan: Plan,
    candidate: Candidate,
    files: tuple[Path, ...],
    measured: Measured,
    metric: float | None,
    runtime: str,
) -> ModelFacts:
    parameters, nonzero = parameter_counts(candidate.module)
    return ModelFacts(
        metric=metric,
        metric_name=plan.task.metric.name,
        size_bytes=sum(file_bytes(files).values()),
        parameters=parameters,
        nonzero_parameters=nonzero,
        macs=mac_counts(candidate.module, plan.task.example(1))[""],
        latency_ms=measured.latency,
        runtime=runtime,
        precision=candidate.precision,
        peak_memory_bytes=measured.peak_memory_bytes,
        throughput=1e3 * plan.target.batch / measured.latency.median,
    )
