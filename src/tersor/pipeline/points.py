"""Whole models for a cost table: cut by a choice, brought to a number format, exported - and never trained.

Latency does not depend on the weights' values, so any units may go, nothing is verified, and ranges come from a
handful of examples.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.search import Choice
from tersor.core.step import Step
from tersor.core.surgery import SkippedBlock
from tersor.graph import Coupling, apply_surgery, couple, plan_surgery
from tersor.graph.blocks import find_blocks, skip_block
from tersor.graph.coupling import runs_of
from tersor.measure import file_bytes, mac_counts
from tersor.measure.latency import Measured
from tersor.pipeline.measuring import Exported, export
from tersor.pipeline.plan import Plan
from tersor.prune.steps import examples
from tersor.quantize import Static
from tersor.search.costs import Point
from tersor.search.moves import finish
from tersor.search.space import Space

FEW = {"range_method": "minmax", "samples": 16, "batch_size": 8}  # for ranges that nobody will use


class Builder:
    """Builds whole models of one number format.

    Args:
        plan: Of the run.
        space: What choices are made of.
        format: Number format.
    """

    def __init__(self, plan: Plan, space: Space, format: str) -> None:
        self.plan, self.space, self.format = plan, space, format

    @contextmanager
    def built(self, choices: Sequence[Choice]) -> Iterator[Mapping[str, Exported]]:
        """Models by the keys of their choices; their files end with the context."""
        with tempfile.TemporaryDirectory(prefix="tersor-points-") as scratch:
            found = {}
            for choice in choices:
                directory = Path(scratch) / choice.key
                directory.mkdir()
                found[choice.key] = export(self.plan, self._candidate(choice), directory)
            yield found

    def point(self, choice: Choice, exported: Exported, measured: Measured) -> Point:
        """What the cost table is fitted on."""
        return Point(
            choice=choice,
            latency_ms=measured.latency.median,
            size_bytes=sum(file_bytes(exported.files).values()),
            macs=mac_counts(exported.candidate.module, self.plan.task.example(1))[""],
            peak_memory_bytes=measured.peak_memory_bytes,
        )

    def _candidate(self, choice: Choice) -> Candidate:
        module = copy.deepcopy(self.plan.original)
        sizes = self.space.by_name
        if choice.widths:
            gone = {name: torch.arange(kept, sizes[name].options[0]) for name, kept in choice.widths.items()}
            module = apply_surgery(module, plan_surgery(module, self._coupling, gone))
        for path in choice.skipped:
            skip_block(module, self._blocks[path])
        candidate = Candidate(module)
        context = Context(self.plan.task, self.plan.target, self.plan.original, self.plan.seed)
        for step in finish(self.format):
            candidate = _hasty(step).apply(candidate, context)
        return candidate

    @cached_property
    def _coupling(self) -> Coupling:
        return couple(self.plan.original, examples(self.plan.task))

    @cached_property
    def _blocks(self) -> Mapping[str, SkippedBlock]:
        return {block.path: block for block in find_blocks(self.plan.original, runs_of(examples(self.plan.task)))[0]}


def _hasty(step: Step) -> Step:
    """The same quantization with ranges from a few examples."""
    return step.model_copy(update=FEW) if isinstance(step, Static) else step
