"""Range methods: from a histogram of values to the interval that the integer codes shall cover."""

from tersor.quantize.ranges.minmax import minmax
from tersor.quantize.ranges.mse import mse
from tersor.quantize.ranges.percentile import percentile

__all__ = ["minmax", "mse", "percentile"]
