"""Quantizes everything, then gives the most sensitive layers their precision back until the metric is good enough.

Wu et al. 2020, section 5.2 (partial quantization), https://arxiv.org/abs/2004.09602.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tersor.core.batch import select_output
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.split import Split
from tersor.core.task import Role
from tersor.quantize.mixed import exactly
from tersor.quantize.prepare import Batches, Prepared
from tersor.quantize.record import with_losses
from tersor.quantize.sensitivity import FIXED, LayerSensitivity, Measure, Options, Sensitivity, measure_layers
from tersor.quantize.static import Static
from tersor.quantize.widths import FLOAT

BYTE = 8
Rung = tuple[str, int]  # layer, the width that it returns to


class Fallback(Static):
    """Static quantization that returns layers to 8 bits, then to float, until the drop is at most `max_drop`.

    The drop of the metric is measured on the search split, with the simulation, against the original model. Layers
    return in the order of their sensitivity (`measure`, `sensitivity_samples`, see `tersor.quantize.sensitivity`); how
    many must is found by bisection, with one quantization per round. What `overrides` names stays as it is. Everything
    else is as in `quantize.static`.
    """

    name: ClassVar[str] = "quantize.fallback"

    max_drop: float = Field(default=0.01, ge=0)
    measure: Measure = "output"
    sensitivity_samples: int = Field(default=128, ge=1)

    @property
    def needs(self) -> frozenset[Role]:
        """Ranges from one split, the metric from another."""
        return frozenset({"calibrate", "search"})

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Quantizes, measures, returns layers."""
        started = time.perf_counter()
        judge = _Judge(context, context.task.require("search", self.name), self.batch_size)
        found = self._measure(candidate, context)
        rungs = self._rungs(found)
        rounds = _Rounds(self, candidate, context, found, rungs, judge)
        notes = []
        reach = judge.drop(candidate.module)
        if reach > self.max_drop:  # nothing that quantization does can repair what pruning did
            taken = 0
            rounds.drop(taken)
            notes.append(f"target not met: the drop is {reach:+.4f} before anything is quantized")
        else:
            taken = fewest(rounds.drop, self.max_drop, self._stops(found, rungs))
        done, drop = rounds.best(taken)
        if drop > self.max_drop and not notes:
            notes.append(f"target not met: the drop is {drop:+.4f}, allowed are {self.max_drop:g}; this is the best")
        returned = ", ".join(f"{layer or '(model)'} {bits}" for layer, bits in dict(rungs[:taken]).items())
        notes += [
            f"drop of {context.task.metric.name} {drop:+.4f} on {judge.count} examples of the search split, by which "
            f"layers were chosen; returned: {returned or 'none'}",
            *rounds.log,
            *done.history[-1].notes,
        ]
        seconds, settings = time.perf_counter() - started, self.model_dump(mode="json")
        record = with_losses(done.history[-1], found).model_copy(
            update={"settings": settings, "seconds": seconds, "notes": notes}
        )
        return replace(done, history=(*candidate.history, record))

    def _guard(self, prepared: Prepared, candidate: Candidate, context: Context, batches: Batches) -> None:
        """Nothing is refused: a round may destroy the model, what comes of it is told."""

    def width(self, row: LayerSensitivity) -> int:
        """What a layer has before any returns."""
        bits = self.weight(row.layer, edge=row.edge)
        return FIXED if row.table and bits != FLOAT else bits

    def _measure(self, candidate: Candidate, context: Context) -> Sensitivity:
        bits = {BYTE, self.weight_bits, max(self.weight_bits, self.edge_bits), *self.overrides.values()} - {FLOAT}
        inputs = self.activation_bits if self.measure == "output" else None
        options = Options(tuple(sorted(bits)), self.measure, self.sensitivity_samples, inputs)
        return measure_layers(candidate, context, options, self.name)

    def _rungs(self, found: Sensitivity) -> list[Rung]:
        """All returns in their order: to 8 bits whatever has fewer, then to float; one layer at least stays."""
        now = {row.layer: self.width(row) for row in found.rows}
        fixed = {row.layer for row in found.rows if any(self._is_fixed(module) for module in row.modules)}
        narrow = [row for row in found.rows if now[row.layer] < BYTE and row.layer not in fixed]
        narrow.sort(key=lambda row: (-row.loss[now[row.layer]], row.layer))
        rest = [row for row in found.rows if now[row.layer] < FLOAT and row.layer not in fixed]
        rest.sort(key=lambda row: (-row.loss[BYTE], row.layer))
        if all(now[layer] == FLOAT for layer in fixed):
            rest = rest[:-1]
        return [(row.layer, BYTE) for row in narrow] + [(row.layer, FLOAT) for row in rest]

    def _is_fixed(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.overrides)

    def _stops(self, found: Sensitivity, rungs: Sequence[Rung]) -> list[int]:
        """Numbers of returns to try first: none, all to 8 bits, all to float."""
        return sorted({0, sum(bits == BYTE for _, bits in rungs), len(rungs)})


def fewest(drop: Callable[[int], float], allowed: float, stops: Sequence[int]) -> int:
    """The smallest number of returns with an allowed drop, by bisection; if there is none, that of the smallest drop.

    Args:
        drop: Of a number of returns; taken to fall as more return.
        allowed: The largest drop that is good enough.
        stops: Numbers to try first, rising.
    """
    low, high = -1, None
    for stop in stops:
        if drop(stop) <= allowed:
            high = stop
            break
        low = stop
    if high is None:
        return min(stops, key=lambda stop: (drop(stop), stop))
    while high - low > 1:
        middle = (low + high) // 2
        if drop(middle) <= allowed:
            high = middle
        else:
            low = middle
    return high


class _Rounds:
    """Quantizations with so many returns, each made once; the results of the best are kept."""

    def __init__(
        self,
        step: Fallback,
        candidate: Candidate,
        context: Context,
        found: Sensitivity,
        rungs: Sequence[Rung],
        judge: _Judge,
    ) -> None:
        self.step, self.candidate, self.context, self.found, self.rungs = step, candidate, context, found, rungs
        self.judge = judge
        self.log: list[str] = []
        self._drops: dict[int, float] = {}
        self._kept: tuple[int, Candidate] | None = None

    def drop(self, returned: int) -> float:
        """The drop with the first `returned` rungs."""
        if returned not in self._drops:
            done = self._quantized(returned)
            assert done.simulation is not None  # noqa: S101 - static quantization makes one
            found = self.judge.drop(done.simulation)
            self._drops[returned] = found
            taken = list(dict(self.rungs[:returned]).values())
            self.log.append(
                f"round {len(self._drops)}: returned {taken.count(BYTE)} layers to 8 bits, {taken.count(FLOAT)} to "
                f"float, drop {found:+.4f}"
            )
            if self._kept is None or self._is_better(returned, self._kept[0]):
                self._kept = returned, done
        return self._drops[returned]

    def _is_better(self, returned: int, kept: int) -> bool:
        """Good enough with fewer returns, or, as long as none is good enough, a smaller drop."""
        allowed = self.step.max_drop
        if self._drops[returned] <= allowed:
            return self._drops[kept] > allowed or returned < kept
        return self._drops[kept] > allowed and self._drops[returned] < self._drops[kept]

    def best(self, returned: int) -> tuple[Candidate, float]:
        """The quantization with so many returns, and its drop."""
        if self._kept is None or self._kept[0] != returned:  # pragma: no cover - the kept one is what was chosen
            return self._quantized(returned), self._drops[returned]
        return self._kept[1], self._drops[returned]

    def widths(self, returned: int) -> dict[str, int]:
        """Layer -> bits."""
        return {row.layer: self.step.width(row) for row in self.found.rows} | dict(self.rungs[:returned])

    def _quantized(self, returned: int) -> Candidate:
        overrides = exactly(self.found, self.widths(returned)) if returned else self.step.overrides
        changed = self.step.model_copy(update={"overrides": overrides})
        return Static.apply(changed, self.candidate, self.context)


class _Judge:
    """The drop of the metric on the search split."""

    def __init__(self, context: Context, split: Split, batch_size: int) -> None:
        self.task, self.split, self.size, self.count = context.task, split, batch_size, len(split)
        self._against: list[Tensor] | None = None
        answers = self._answers(context.original)
        if self.task.metric.against_original:
            self._against = answers
        self._before = self._value(answers)

    def drop(self, model: Callable[..., object]) -> float:
        """By how much the metric is worse; infinite if an answer is NaN or Inf."""
        answers = self._answers(model)
        if not all(bool(torch.isfinite(answer).all()) for answer in answers if answer.is_floating_point()):
            return math.inf
        sign = 1 if self.task.metric.higher_is_better else -1
        return sign * (self._before - self._value(answers))

    def _answers(self, model: Callable[..., object]) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for batch in self.split.batches(self.size):
                answer = batch.call(model)
                graph = isinstance(model, torch.fx.GraphModule)
                found.append(answer if graph else select_output(answer, self.task.output))
        return found

    def _value(self, answers: Sequence[Tensor]) -> float:
        metric, statistics, labels = self.task.metric, [], []
        for index, (answer, batch) in enumerate(zip(answers, self.split.batches(self.size), strict=True)):
            expected = batch.labels if self._against is None else self._against[index]
            statistics.append(metric.statistic(answer, expected))
            labels += [] if expected is None else [expected]
        return metric.value(torch.cat(statistics), torch.cat(labels) if labels else None)
