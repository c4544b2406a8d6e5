"""Puts the report together and says plainly what is not as good as hoped."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from tersor.core.candidate import Candidate
from tersor.core.certificate import Certificate
from tersor.core.machine import environment
from tersor.core.report import Changes, Coverage, Layer, Report
from tersor.measure import changes, file_bytes, layer_table, mac_counts
from tersor.pipeline.measuring import Compared, Exported, Facts
from tersor.pipeline.plan import Plan
from tersor.report import wording


def assemble(
    plan: Plan, deployed: Exported, facts: Facts, compared: Compared | None, certificate: Certificate | None
) -> Report:
    """The report of a finished run."""
    candidate = deployed.candidate
    macs = mac_counts(candidate.module, plan.task.example(1))
    layers = layer_table(plan.original, candidate.module, candidate.plan, macs)
    changed: Changes | None = None
    if compared is not None:
        changed = changes(compared.original, compared.deployed, plan.task.class_names)
    verdict: Literal["certified", "not certified", "no certificate"] = "no certificate"
    if certificate is not None:
        verdict = "certified" if certificate.certified else "not certified"
    return Report(
        name=type(plan.original).__name__,
        verdict=verdict,
        warnings=_warnings(plan, candidate, facts, certificate),
        baseline=facts.baseline,
        runtime_baseline=facts.runtime_baseline,
        deployed=facts.deployed,
        ratios=facts.ratios,
        certificate=certificate,
        changes=changed,
        coverage=_coverage(plan, deployed, layers, macs[""]),
        layers=layers,
        size_breakdown=file_bytes(deployed.files),
        environment=environment(threads=plan.target.threads, seed=plan.seed),
        recipe=plan.recipe.as_data(),
        target=plan.target.model_dump(mode="json"),
        budget=plan.budget.model_dump(mode="json"),
        history=list(candidate.history),
    )


def _coverage(plan: Plan, deployed: Exported, layers: list[Layer], total_macs: int) -> Coverage:
    candidate = deployed.candidate
    stored = candidate.plan.stored if candidate.plan is not None else {}
    total = sum(parameter.numel() for parameter in candidate.module.parameters())
    parameters = dict(candidate.module.named_parameters(remove_duplicate=False))
    in_low = sum(parameters[path].numel() for path in stored if path in parameters)  # a weight may be a buffer
    before = sum(parameter.numel() for parameter in plan.original.parameters())
    pruned = before - total + sum(int((~mask).sum()) for mask in candidate.masks.values())
    rounds_activations = candidate.plan is not None and candidate.plan.mode in {"static", "dynamic"}
    low_macs = sum(layer.macs for layer in layers if layer.precision != "float32" and rounds_activations)
    operators: list[str] = []
    if candidate.plan is not None:
        operators = plan.runtime.float_operators(
            deployed.loaded.directory, plan.task.example(1), signature=plan.signature, target=plan.target
        )
    return Coverage(
        parameters_quantized=in_low / max(total, 1),
        macs_quantized=min(1.0, low_macs / max(total_macs, 1)),
        parameters_pruned=pruned / max(before, 1),
        float_operators=operators,
    )


def _warnings(plan: Plan, candidate: Candidate, facts: Facts, certificate: Certificate | None) -> list[str]:
    found = []
    same = facts.ratios.latency_same_runtime
    if plan.recipe.steps and plan.budget.minimise == "latency" and same is not None and same <= 1.0:
        found.append(
            f"not faster: {same:.2f}x of the uncompressed model's speed in the same runtime; this recipe does not "
            "help on this target"
        )
    if plan.budget.minimise == "size" and facts.deployed.size_bytes >= facts.runtime_baseline.size_bytes:
        found.append("not smaller than the uncompressed model in the same runtime")
    measured = {"baseline": facts.baseline, "runtime baseline": facts.runtime_baseline, "deployed": facts.deployed}
    for name, model in measured.items():
        if model.latency_ms is not None and model.latency_ms.noisy:
            spread = model.latency_ms.iqr / model.latency_ms.median
            found.append(f"latency of the {name} is noisy: its interquartile range is {spread:.0%} of the median")
    if certificate is not None and not certificate.certified:
        more = f"; about {certificate.examples_needed:,} examples would do" if certificate.examples_needed else ""
        bounded = f"may be up to {certificate.upper_bound:.4f}" if isfinite(certificate.upper_bound) else "is unbounded"
        found.append(
            f"budget not met: the drop {bounded}, allowed are {certificate.max_drop:.4f}. This is the best so far{more}"
        )
    if certificate is not None and certificate.times_asked > 1:
        found.append(
            f"the certify split has been asked by {certificate.times_asked} runs: earlier ones spent a share of the "
            f"error, so this one was tested at {wording.level(certificate)}; {wording.confidence(certificate)} holds "
            "over all questions together, unless a candidate was made from earlier answers"
        )
    if certificate is not None and certificate.measures == "agreement":
        found.append("without labels the certificate is about agreement with the original, not about accuracy")
    found.extend(note for record in candidate.history for note in record.notes if _is_caution(note))
    return found


def _is_caution(note: str) -> bool:
    return note.startswith(("no speed-up expected", "weights reduced", "never reached", "target not met"))
