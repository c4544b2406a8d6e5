"""Graphs of a model: capture, folding, fake quantization and lowering.

All knowledge about operators lives in `graph.rules`.
"""

from tersor.graph.capture import capture
from tersor.graph.divergence import first_divergence
from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import fold_batch_norm
from tersor.graph.lower import lower

__all__ = ["FakeQuantize", "capture", "first_divergence", "fold_batch_norm", "lower"]
