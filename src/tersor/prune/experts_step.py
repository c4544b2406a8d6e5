"""Expert pruning as a step of a recipe."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tersor.core.context import Context
from tersor.core.report import PrunedFamily, Pruning
from tersor.core.task import Role
from tersor.probe import Need
from tersor.prune.experts import ExpertReport, Experts, experts
from tersor.prune.sparsity import FROM_LOSS
from tersor.prune.steps import Cutting, Pruned, Whole, macs_of, told


class ExpertsStep(Cutting, Experts):
    """Removes whole experts of mixtures, and proves that the rest is chosen from as before; settings: `Experts`."""

    name: ClassVar[str] = "prune.experts"
    instead: ClassVar[str] = "usage"

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, where usage or losses are measured."""
        return frozenset({"calibrate"}) if self.criterion != "random" and self.experts is None else frozenset()

    @property
    def judged(self) -> tuple[str, frozenset[Need]]:
        """As `Cutting.judged`."""
        return self.criterion, FROM_LOSS if self.needs and self.criterion == "loss" else frozenset()

    def cut(self, module: nn.Module, whole: Whole, context: Context, **given: Any) -> Pruned:
        """As `Cutting.cut`; `SurgeryError` if a named mixture or expert does not exist or cannot go."""
        report = experts(module, **given, **{name: getattr(self, name) for name in Experts.model_fields})
        return Pruned(report, pruning_of(report, whole, macs_of(module, context)))


def pruning_of(report: ExpertReport, whole: Whole, macs_after: int) -> Pruning:
    """What the run's report keeps: every mixture that could shrink is a family of its experts.

    Args:
        report: What was done.
        whole: The module before.
        macs_after: At batch 1.
    """
    gone = {name: len(report.removed.get(name, ())) for name in report.kept}
    units = {name: len(kept) + gone[name] for name, kept in report.kept.items()}
    return told(
        report,
        whole,
        macs_after,
        amount=sum(gone.values()) / max(1, sum(units.values())),
        touched=[path for parts in report.parts.values() for path in parts],
        families=[
            PrunedFamily(
                name=name,
                kind="expert",
                units=units[name],
                kept=len(kept),
                layers=list(dict.fromkeys(path.rpartition(".")[0] for path in report.parts[name])),
            )
            for name, kept in report.kept.items()
        ],
    )
