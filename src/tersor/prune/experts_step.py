"""Expert pruning as a step of a recipe."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from tersor.core.context import Context
from tersor.core.report import FrozenPart, PrunedFamily, Pruning
from tersor.core.task import Role
from tersor.prune.experts import ExpertReport, Experts, experts
from tersor.prune.measured import check_labels, loss_of
from tersor.prune.sparsity import FROM_LOSS
from tersor.prune.steps import Cutting, Pruned, Whole, coverage, examples, macs_of


class ExpertsStep(Cutting, Experts):
    """Removes whole experts of mixtures, and proves that the rest is chosen from as before; settings: `Experts`."""

    name: ClassVar[str] = "prune.experts"

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, where usage or losses are measured."""
        return frozenset({"calibrate"}) if self.criterion != "random" and self.experts is None else frozenset()

    def prune(self, module: nn.Module, context: Context) -> Pruned:
        """As `Cutting.prune`; `SurgeryError` if a named mixture or expert does not exist or cannot go."""
        batches = self.batches(context)
        needs = FROM_LOSS if self.needs and self.criterion == "loss" else frozenset()
        check_labels(batches or (), needs, self.name, self.criterion, instead="usage")
        whole = Whole.of(module, context)
        report = experts(
            module,
            examples(context.task),
            data=batches,
            loss=loss_of(context.task),
            inplace=True,
            **{name: getattr(self, name) for name in Experts.model_fields},
        )
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
    return Pruning(
        parameters_before=report.params_before,
        parameters_after=report.params_after,
        macs_before=whole.macs,
        macs_after=macs_after,
        amount=sum(gone.values()) / max(1, sum(units.values())),
        coverage=coverage([path for parts in report.parts.values() for path in parts], whole.sizes),
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
        frozen=[FrozenPart(name=item.name, reason=item.reason) for item in report.frozen],
        max_error=report.max_error,
        layers=whole.layers,
    )
