"""Depth pruning as a step of a recipe."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tersor.core.context import Context
from tersor.core.report import PrunedFamily, Pruning
from tersor.core.task import Role
from tersor.probe import Need
from tersor.prune.depth import Depth, DepthReport, depth
from tersor.prune.sparsity import FROM_LOSS
from tersor.prune.steps import Cutting, Pruned, Whole, macs_of, told


class DepthStep(Cutting, Depth):
    """Replaces whole blocks by the identity, and proves that nothing else changed; settings: `Depth`.

    `similarity` is measured on the calibrate split, or, without one, on a few examples of the task.
    """

    name: ClassVar[str] = "prune.depth"
    instead: ClassVar[str] = "similarity"

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, if losses are compared."""
        return frozenset({"calibrate"}) if self.criterion == "loss" and self.blocks is None else frozenset()

    @property
    def judged(self) -> tuple[str, frozenset[Need]]:
        """As `Cutting.judged`."""
        return self.criterion, FROM_LOSS if self.needs else frozenset()

    def cut(self, module: nn.Module, whole: Whole, context: Context, **given: Any) -> Pruned:
        """As `Cutting.cut`; `SurgeryError` if a named block does not exist or cannot go."""
        report = depth(module, **given, **{name: getattr(self, name) for name in Depth.model_fields})
        return Pruned(report, pruning_of(report, whole, macs_of(module, context)))


def pruning_of(report: DepthReport, whole: Whole, macs_after: int) -> Pruning:
    """What the run's report keeps: every block that could go is a family of one unit.

    Args:
        report: What was done.
        whole: The module before.
        macs_after: At batch 1.
    """
    blocks = {
        block: [layer for layer in whole.layers if f"{layer}.".startswith(f"{block}.")]
        for block in (*report.removed, *report.kept)
    }
    inside = [path for path in whole.sizes if any(path.startswith(f"{block}.") for block in blocks)]
    return told(
        report,
        whole,
        macs_after,
        amount=len(report.removed) / max(1, len(blocks)),
        touched=inside,
        families=[
            PrunedFamily(name=block, kind="block", units=1, kept=int(block in report.kept), layers=layers)
            for block, layers in sorted(blocks.items(), key=lambda item: [whole.layers.index(x) for x in item[1][:1]])
        ],
    )
