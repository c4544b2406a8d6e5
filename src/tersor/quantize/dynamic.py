"""Dynamic quantization: weights int8, activations rounded with scales that are found while the model runs.

``y = s_x · s_w · (q_x − z_x) q_w``: `s_x` and `z_x` from the smallest and largest value of each input, per call; `s_w`
per output channel. No calibration. Jacob et al. 2018, https://arxiv.org/abs/1712.05877; for recurrent layers He et al.
2016, https://arxiv.org/abs/1611.10176.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.machine import saturates_int8
from tersor.core.quantization import QuantPlan, precision_name
from tersor.core.step import Kind, Step
from tersor.quantize.modules import Kind as Layer
from tersor.quantize.modules import ModuleWeight, select, summary
from tersor.quantize.rounding.base import WeightGrid
from tersor.quantize.run_time import simulate

BITS = 8


class Dynamic(Step):
    """Rounds the weights of linear, attention and LSTM layers to int8; their inputs are rounded at run time.

    Needs no data. Convolutions stay float: ONNX Runtime's integer convolution without fixed scales is slower than its
    float one. GRU and RNN weights are stored in int8 but computed with in float, as no runtime has kernels; for
    `inductor` so are LSTM and `nn.MultiheadAttention`.
    `embeddings` stores look-up tables in int8, one scale per row. `keep` leaves layers in float, by glob patterns over
    their paths.
    """

    name: ClassVar[str] = "quantize.dynamic"
    kind: ClassVar[Kind] = "quantize"

    embeddings: bool = True
    keep: tuple[str, ...] = Field(default=(), strict=False)

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name("dynamic", packed=False)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rounds a copy; the result carries the plan and a simulation that rounds activations too."""
        started = time.perf_counter()
        module = copy.deepcopy(candidate.module).eval()
        example, output = context.task.example(2), context.task.output
        kinds: tuple[Layer, ...] = ("linear", "recurrent", *(("embedding",) if self.embeddings else ()))
        chosen = select(module, self.name, example=example, output=output, keep=self.keep, kinds=kinds)
        reduce = context.target.reduce_range
        reduced = saturates_int8() if reduce is None else reduce
        tensors = []
        for weight in chosen:
            bits = BITS - 1 if reduced and weight.kind in ("linear", "recurrent") else BITS
            rows = weight.rows()
            grid = WeightGrid.fitted(rows, weight.scheme(bits, symmetric=True, group_size=None))
            weight.write(grid.nearest(rows))
            tensors.append(weight.entry(grid, None))
        plan = QuantPlan(tensors=tensors, mode="dynamic")
        rounding = {weight.module_path for weight in chosen if _rounds_inputs(weight, context.target.runtime)}
        simulation = simulate(module, rounding, tuple(example.kwargs), output)
        done = replace(candidate, module=module, plan=plan, simulation=simulation)
        notes = [
            summary(chosen, plan.weights, module) + ", activations in uint8 with scales found at run time",
            *self._cautions(module, chosen, context.target.runtime, reduced=reduced),
        ]
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)

    def _cautions(self, module: nn.Module, chosen: list[ModuleWeight], runtime: str, *, reduced: bool) -> list[str]:
        notes = []
        if reduced:
            notes.append("weights reduced to 7 bits: int8 kernels overflow on x86 without VNNI")
        if any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()):
            notes.append("convolutions stay float: without fixed scales their integer kernels are slower")
        stored = sorted(
            {
                type(weight.module).__name__
                for weight in chosen
                if weight.kind in ("linear", "recurrent") and not _rounds_inputs(weight, runtime)
            }
        )
        if stored:
            notes.append(
                f"no speed-up expected from {', '.join(stored)} layers: {runtime} has no kernel that rounds their "
                "activations, so their weights are stored in int8 and decoded"
            )
        return notes


def _rounds_inputs(weight: ModuleWeight, runtime: str) -> bool:
    if weight.kind == "linear":
        return runtime != "inductor" or not isinstance(weight.module, nn.MultiheadAttention)
    return weight.kind == "recurrent" and isinstance(weight.module, nn.LSTM) and runtime == "onnxruntime"
