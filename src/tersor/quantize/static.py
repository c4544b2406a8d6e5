"""Post-training static quantization: ranges from a few hundred examples, no training.

Weights signed, symmetric, one scale per output channel; activations affine, one scale per tensor; biases int32.
BatchNorm is folded first. Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Nagel et al. 2021,
https://arxiv.org/abs/2106.08295.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.quantization import precision_name
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.quantize.finish import finish
from tersor.quantize.prepare import Prepared, batches_of, prepare, set_activation_ranges, set_weight_ranges
from tersor.quantize.widths import Widths


class Static(Widths, Step):
    """Quantizes with ranges fixed on the calibrate split, by default to int8.

    `range_method` chooses the activations' ranges: `minmax`, `moving_average` of the batches, `percentile` (99.99 %),
    `mse` or `entropy`. `samples` limits how many calibration examples are used. `pack` stores weights of at most 4
    bits as such: the file gets smaller, the layer computes in float.
    """

    name: ClassVar[str] = "quantize.static"
    kind: ClassVar[Kind] = "quantize"

    range_method: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    samples: int = Field(default=300, ge=1)
    batch_size: int = Field(default=50, ge=1)
    pack: bool = False

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split."""
        return frozenset({"calibrate"})

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name("static", packed=self.pack)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Captures, folds, places, calibrates; the result carries the plan and its simulation."""
        started = time.perf_counter()
        split = context.task.require("calibrate", self.name)
        prepared = prepare(candidate, context, self.name, self)
        batches = batches_of(split, self.samples, self.batch_size)
        unreached = set_activation_ranges(prepared, self.range_method, batches)
        set_weight_ranges(prepared)
        plan, module = finish(prepared, candidate.module, pack=self.pack)
        notes = [
            summary(prepared, unreached)
            + f", ranges by {self.range_method} on {min(self.samples, len(split))} examples",
            *cautions(prepared, unreached),
        ]
        done = replace(candidate, module=module, plan=plan, simulation=prepared.simulation)
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)


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
