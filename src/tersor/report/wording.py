"""The sentences about a report that the page, the card and the terminal share."""

from __future__ import annotations

from tersor.core.certificate import Certificate
from tersor.core.report import ModelFacts, Report
from tersor.report import units

METHODS = {
    "exact-paired": "exact bound on paired right/wrong answers",
    "clopper-pearson": "Clopper–Pearson bound on changed answers",
    "betting": "betting bound on paired bounded scores",
    "paired-bootstrap": "paired bootstrap",
}


def certified_metric(report: Report) -> str:
    """The name of what the certificate bounds: the metric, or agreement with the original model."""
    if report.certificate is not None and report.certificate.measures == "agreement":
        return "agreement"
    return report.deployed.metric_name


def verdict(report: Report) -> str:
    """The verdict in one or two words, marked when it is approximate."""
    words = report.verdict.capitalize()
    approximate = report.certificate is not None and not report.certificate.exact
    return f"{words} (approximate)" if approximate else words


def confidence(certificate: Certificate) -> str:
    """The confidence as a percentage, as in ``95 %``."""
    return f"{round(100 * certificate.confidence, 6):g} %"


def level(certificate: Certificate) -> str:
    """The confidence of this single test, as in ``99.55 %``, where it differs from the promised one; else empty."""
    if certificate.level is None or certificate.level == certificate.confidence:
        return ""
    return f"{min(round(100 * certificate.level, 10), 99.9999999999):.12g} %"


def headline(report: Report) -> str:
    """The whole result in one plain sentence."""
    parts = [
        compared(report.ratios.size, "smaller", "larger", "the same size"),
        compared(
            report.ratios.latency,
            "faster than PyTorch eager",
            "slower than PyTorch eager",
            "as fast as PyTorch eager",
        ),
    ]
    if has_runtime_baseline(report):
        other = "the uncompressed model on the same runtime"
        parts.append(
            compared(
                report.ratios.latency_same_runtime,
                f"faster than {other}",
                f"slower than {other}",
                f"as fast as {other}",
            )
        )
    if report.ratios.latency is None:
        parts.append("speed not measured")
    facts = ", ".join(part for part in parts if part)
    return f"{facts} ({where(report)}); {loss(report)}."


def capital(text: str) -> str:
    """The text with its first letter capitalised and nothing else touched."""
    return text[:1].upper() + text[1:]


def compared(value: float | None, better: str, worse: str, equal: str) -> str:
    """A ratio in words: ``3.9× smaller``, ``1.3× larger``, or `equal` when it rounds to one."""
    if value is None or not units.known(value) or value <= 0:
        return ""
    if units.ratio(value) == "1.0×" or units.ratio(1 / value) == "1.0×":
        return equal
    return f"{units.ratio(value)} {better}" if value > 1 else f"{units.ratio(1 / value)} {worse}"


def where(report: Report) -> str:
    """Runtime, threads and batch that the numbers hold for."""
    runtime = units.one_line(report.deployed.runtime, 40)
    threads = report.environment.threads
    batch = units.one_line(report.target.get("batch", 1), 12)
    return f"{runtime}, {threads} thread{'s' if threads != 1 else ''}, batch {batch}"


def loss(report: Report) -> str:
    """What is known about the loss, as a clause."""
    certificate = report.certificate
    if certificate is None:
        metric = units.one_line(report.deployed.metric_name, 40)
        return f"no certificate: how much {metric} is lost is not bounded"
    bound = bounded_loss(report, certificate)
    if certificate.certified:
        return bound
    budget = units.exact_difference(certificate.max_drop, certified_metric(report))
    return f"not certified: {bound}, and the budget is {budget}"


def bounded_loss(report: Report, certificate: Certificate) -> str:
    """The bound of the certificate as a clause; rounded towards more loss."""
    metric = certified_metric(report)
    sure = f"with {'' if certificate.exact else 'about '}{confidence(certificate)} confidence"
    if certificate.upper_bound == float("inf"):
        return "the loss could not be bounded"
    if certificate.upper_bound <= 0:
        return f"{sure} no {units.one_line(metric, 40)} lost"
    bound = units.difference(certificate.upper_bound, metric, upwards=True)
    return f"{sure} at most {bound} {units.metric_unit(metric)} lost"


def advice(certificate: Certificate) -> str:
    """What would lead to a certificate, when there is none."""
    if certificate.certified:
        return ""
    if certificate.drop >= certificate.max_drop:
        return "The observed drop alone uses up the budget: more examples would not help, a milder recipe would."
    if certificate.examples_needed is None:
        return "More certify examples or a milder recipe could bring the bound within the budget."
    return (
        f"At the observed rates about {units.integer(certificate.examples_needed)} certify examples would "
        f"bring the bound within the budget; {units.integer(certificate.n)} were used."
    )


def asked(certificate: Certificate) -> str:
    """What is left of a certify split that has been asked before."""
    if certificate.times_asked == 1:
        return ""
    if not level(certificate):
        return (
            f"This certify split has now been asked {units.integer(certificate.times_asked)} times. The stated "
            "confidence is that of a single question; whoever keeps asking until the answer is yes passes sooner "
            "or later by luck. Confirm on examples that no earlier run has seen."
        )
    return (
        f"This certify split has now been asked by {units.integer(certificate.times_asked)} runs, see "
        f"certify-ledger.jsonl. This one was tested at {level(certificate)}, so that {confidence(certificate)} holds "
        "over all questions together; the next one must be ten times as sure. Nothing holds for a candidate that was "
        "made from earlier answers: confirm it on examples that no earlier run has seen."
    )


def noisy(report: Report) -> str:
    """The note about measurements whose spread is too wide to trust small differences."""
    names = [name for _, name, facts in models(report) if facts.latency_ms is not None and facts.latency_ms.noisy]
    if not names:
        return ""
    return (
        f"Noisy: {' and '.join(names)} varied by more than a tenth of the median between calls "
        "(interquartile range). Differences of this order are not findings."
    )


def models(report: Report) -> list[tuple[str, str, ModelFacts]]:
    """Role, name and facts of the measured models, the deployed one first.

    Where the target runtime is eager itself, the two baselines are one and are listed once.
    """
    rows = [("deployed", "deployed", report.deployed)]
    if has_runtime_baseline(report):
        name = f"uncompressed, {units.one_line(report.runtime_baseline.runtime, 16)}"
        rows.append(("runtime", name, report.runtime_baseline))
    rows.append(("eager", "uncompressed, PyTorch eager", report.baseline))
    return rows


def has_runtime_baseline(report: Report) -> bool:
    """Whether the uncompressed model was also measured in a runtime other than eager."""
    return report.runtime_baseline.runtime != report.baseline.runtime
