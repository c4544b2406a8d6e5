"""Statistics of a running model, shared by the methods that need them."""

from tersor.probe.batchnorm import reestimate_batchnorm
from tersor.probe.evidence import Evidence, Need, collect
from tersor.probe.histogram import Histogram, histograms
from tersor.probe.macs import multiply_accumulates

__all__ = [
    "Evidence",
    "Histogram",
    "Need",
    "collect",
    "histograms",
    "multiply_accumulates",
    "reestimate_batchnorm",
]
