"""Graphs of a model: capture, folding, fake quantization and lowering; coupling, surgery and its verification.

What operators mean to quantization lives in `graph.rules`, what they mean to pruning in `graph.coupling.rules`.
"""

from tersor.graph.capture import capture
from tersor.graph.coupling import Coupling, Family, Frozen, Place, couple
from tersor.graph.divergence import first_divergence
from tersor.graph.fake_quantize import FakeQuantize
from tersor.graph.fold import fold_batch_norm
from tersor.graph.lower import lower
from tersor.graph.surgery import apply_surgery, plan_surgery, replay
from tersor.graph.verify import Verdict, Verifier, compare

__all__ = [
    "Coupling",
    "FakeQuantize",
    "Family",
    "Frozen",
    "Place",
    "Verdict",
    "Verifier",
    "apply_surgery",
    "capture",
    "compare",
    "couple",
    "first_divergence",
    "fold_batch_norm",
    "lower",
    "plan_surgery",
    "replay",
]
