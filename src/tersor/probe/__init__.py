"""Statistics of a running model, shared by the methods that need them."""

from tersor.probe.evidence import Evidence, Need, collect
from tersor.probe.histogram import Histogram, histograms

__all__ = ["Evidence", "Histogram", "Need", "collect", "histograms"]
