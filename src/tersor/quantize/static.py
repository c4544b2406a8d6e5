"""Post-training static quantization: ranges from a few hundred examples, no training.

Weights signed, symmetric, one scale per output channel; activations affine, one scale per tensor; biases int32.
BatchNorm is folded first. Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Nagel et al. 2021,
https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from tersor.core.batch import select_output
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.quantization import precision_name
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.quantize.correct import Correction, correct
from tersor.quantize.distilled_data import distilled_batches
from tersor.quantize.equalize import equalize
from tersor.quantize.finish import finish
from tersor.quantize.guard import check_usable, output_errors
from tersor.quantize.prepare import (
    Batches,
    Prepared,
    batches_of,
    prepare,
    set_activation_ranges,
    set_weight_ranges,
)
from tersor.quantize.reconstruct import Settings, Unit, reconstruct
from tersor.quantize.record import record_of
from tersor.quantize.reference import float_reference
from tersor.quantize.round_weights import round_weights
from tersor.quantize.smooth import smooth
from tersor.quantize.widths import Widths


class Static(Widths, Step):
    """Quantizes with ranges fixed on the calibrate split, by default to int8.

    `range_method` chooses the activations' ranges: `minmax`, `moving_average` of the batches, `percentile` (99.99 %),
    `mse` or `entropy`. `samples` limits how many calibration examples are used. `pack` stores weights of at most 4
    bits as such: the file gets smaller, the layer computes in float.

    Before anything is rounded, `equalize` evens out the channels between two layers, and `smooth` (0 to 1) moves
    outliers of activations into weights. Accuracy is recovered by `rounding`: `gptq` and `obq` round each weight for
    what the layer sees, `adaround` and `blocks` learn it in `steps` steps per layer or block; and by `correction` of
    the channels' means, or means and variances. With `examples: distilled` the examples are made from the model's
    BatchNorm statistics; no split is read.
    """

    name: ClassVar[str] = "quantize.static"
    kind: ClassVar[Kind] = "quantize"

    range_method: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    samples: int = Field(default=300, ge=1)
    batch_size: int = Field(default=50, ge=1)
    examples: Literal["calibrate", "distilled"] = "calibrate"
    equalize: bool = False
    smooth: float | None = Field(default=None, ge=0, le=1)
    rounding: Literal["nearest", "gptq", "obq", "adaround", "blocks"] = "nearest"
    steps: int = Field(default=1000, ge=1)
    drop: float = Field(default=0.5, ge=0, lt=1)
    correction: Correction | None = None
    pack: bool = False

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, unless data are distilled."""
        return frozenset({"calibrate"} if self.examples == "calibrate" else ())

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name("static", packed=self.pack)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Captures, folds, places, calibrates; the result carries the plan and its simulation.

        Raises:
            AccuracyError: if the quantized model agrees with its original no better than chance.
        """
        started = time.perf_counter()
        batches, count = self._batches(candidate, context)
        notes: list[str] = []

        def change(graph_module: fx.GraphModule, units: dict[str, Tensor]) -> None:
            if self.equalize:
                notes.append(f"{equalize(graph_module, units)} pairs of layers equalized")
            if self.smooth is not None:
                notes.append(f"activations smoothed at {smooth(graph_module, units, batches, self.smooth)} places")

        prepared = prepare(candidate, context, self.name, self, change=change)
        unreached = set_activation_ranges(prepared, self.range_method, batches)
        set_weight_ranges(prepared)
        self._recover(prepared, batches, context)
        plan, module = finish(prepared, candidate.module, pack=self.pack)
        self._guard(prepared, candidate, context, batches)
        made = "distilled " if self.examples == "distilled" else ""
        first = f"{summary(prepared, unreached)}, ranges by {self.range_method} on {count} {made}examples"
        notes = [first, *notes, *cautions(prepared, unreached)]
        done = replace(candidate, module=module, plan=plan, simulation=prepared.simulation)
        widths = record_of(prepared, context.task.example(1))
        seconds = time.perf_counter() - started
        return done.record(self.name, self.model_dump(mode="json"), seconds, notes, quantization=widths)

    def _batches(self, candidate: Candidate, context: Context) -> tuple[Batches, int]:
        """The examples to look at, and how many."""
        if self.examples == "distilled":
            example = context.task.example(1)
            made = distilled_batches(
                candidate.module, example, self.samples, batch_size=self.batch_size, seed=context.seed
            )
            return lambda: made, self.samples
        split = context.task.require("calibrate", self.name)
        return batches_of(split, self.samples, self.batch_size), min(self.samples, len(split))

    def _guard(self, prepared: Prepared, candidate: Candidate, context: Context, batches: Batches) -> None:
        """Raises `AccuracyError` if nothing is left of what the model knew."""
        with torch.no_grad():
            before = [select_output(batch.call(candidate.module), context.task.output) for batch in batches()]
            after = [prepared.simulation(*batch.tensors().values()) for batch in batches()]
        before, after = (_rows(outputs) for outputs in (before, after))
        check_usable(prepared, torch.cat(before), torch.cat(after), lambda: output_errors(prepared, batches))

    def _recover(self, prepared: Prepared, batches: Batches, context: Context) -> None:
        """Rounds the weights with care, and corrects what that shifted."""
        if self.rounding == "nearest" and self.correction is None:
            return
        reference = float_reference(prepared) if self.correction is not None else None  # before weights are replaced
        if self.rounding == "gptq" or self.rounding == "obq":
            round_weights(prepared, batches, self.rounding)
        elif self.rounding != "nearest":
            unit: Unit = "layer" if self.rounding == "adaround" else "block"
            settings = Settings(unit, self.steps, self.drop if unit == "block" else 0, context.seed)
            reconstruct(prepared, batches, settings, lambda done, total: context.progress(self.name, done, total))
        if self.correction is not None:
            correct(prepared, batches, self.correction, reference)
        del reference
        gc.collect()  # graphs hold themselves in cycles, and with them the weights that were replaced


def _rows(outputs: list[Tensor]) -> list[Tensor]:
    """Outputs that can be put together: those whose lengths differ are taken as rows of numbers."""
    shapes = {output.shape[1:] for output in outputs}
    return outputs if len(shapes) == 1 else [output.flatten() for output in outputs]


def summary(prepared: Prepared, unreached: list[str]) -> str:
    """How many tensors have how many bits."""
    placement = prepared.placement
    counts: dict[tuple[str, int], int] = {}
    for kind, paths in (("weights", placement.weights), ("activations", placement.activations)):
        for path in paths:
            if placement.activations.get(path) not in unreached:
                key = kind, prepared.quantizer(path).scheme.bits
                counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{count} {kind} in int{bits}" for (kind, bits), count in counts.items())


def cautions(prepared: Prepared, unreached: list[str]) -> list[str]:
    """What a reader must know."""
    reduced = prepared.style.reduced_weights
    return [
        *(["weights reduced to 7 bits: int8 kernels overflow on x86 without VNNI"] if reduced else []),
        *(f"never reached in calibration, stays float: {name}" for name in unreached),
    ]
