"""Measuring: accuracy, latency, size, and the certificate."""

from tersor.measure.accuracy import Evaluation, evaluate
from tersor.measure.certificate import (
    certify,
    certify_metric,
    examples_needed,
    smallest_certifiable,
)
from tersor.measure.changes import changes
from tersor.measure.latency import Contestant, Protocol, latency, paired_ratio
from tersor.measure.size import file_bytes, layer_table, mac_counts, parameter_counts

__all__ = [
    "Contestant",
    "Evaluation",
    "Protocol",
    "certify",
    "certify_metric",
    "changes",
    "evaluate",
    "examples_needed",
    "file_bytes",
    "latency",
    "layer_table",
    "mac_counts",
    "paired_ratio",
    "parameter_counts",
    "smallest_certifiable",
]
