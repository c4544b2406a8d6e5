"""What the page and the card say about structured pruning: one part for each pruning of the history."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from markupsafe import Markup

from tersor.core.report import PrunedFamily, Pruning, Report
from tersor.report import units
from tersor.report.coupling import coupling_plot

NAMES_SHOWN = 3
REASONS_SHOWN = 12
REASON_LENGTH = 160


class Reason(NamedTuple):
    """Why something stayed whole, and what."""

    reason: str
    names: str
    places: int


class Part(NamedTuple):
    """One pruning, ready to be shown."""

    step: str
    pruning: Pruning
    families: list[PrunedFamily]
    reasons: list[Reason]
    more_reasons: int
    plot: Markup | None


def parts(report: Report, *, drawn: bool = True) -> list[Part]:
    """The structured prunings of a run, in order; empty if there was none."""
    found = []
    for record in report.history:
        if record.pruning is not None:
            why = reasons(record.pruning)
            plot = coupling_plot(record.pruning) if drawn else None
            hidden = max(0, len(why) - REASONS_SHOWN)
            families = by_loss(record.pruning)
            found.append(Part(record.name, record.pruning, families, why[:REASONS_SHOWN], hidden, plot))
    return found


def by_loss(pruning: Pruning) -> list[PrunedFamily]:
    """Families, those that lost most units first."""
    return sorted(pruning.families, key=lambda family: (family.kept - family.units, family.name))


def reasons(pruning: Pruning) -> list[Reason]:
    """Each reason once, with the first names that it holds for; the most frequent first."""
    names: dict[str, list[str]] = defaultdict(list)
    for item in pruning.frozen:
        names[units.one_line(item.reason, REASON_LENGTH)].append(units.one_line(item.name, 80))
    return sorted(
        (
            Reason(
                reason,
                ", ".join(found[:NAMES_SHOWN])
                + (f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""),
                len(found),
            )
            for reason, found in names.items()
        ),
        key=lambda item: -item.places,
    )


def proof(pruning: Pruning) -> str:
    """What was checked."""
    if pruning.max_error is None:
        return "Not verified against the masked model."
    return (
        "Verified: the model without these units answers like the whole model with them masked, up to a relative "
        f"difference of {units.significant(pruning.max_error, 2)}."
    )
