"""Statistics of a running model, shared by the methods that need them."""

from tersor.probe.histogram import Histogram, histograms

__all__ = ["Histogram", "histograms"]
