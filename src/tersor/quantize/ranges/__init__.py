"""Range methods: from the values of a region to the interval that the integer codes shall cover.

Each is a function `(points, scheme) -> (low, high)`; `tersor.quantize.ranges.base` tells what points are: the bins of
a calibration histogram, or the values of a tensor.
"""

from tersor.quantize.ranges.entropy import entropy
from tersor.quantize.ranges.minmax import minmax
from tersor.quantize.ranges.moving_average import moving_average
from tersor.quantize.ranges.mse import mse
from tersor.quantize.ranges.percentile import percentile

__all__ = ["entropy", "minmax", "moving_average", "mse", "percentile"]
