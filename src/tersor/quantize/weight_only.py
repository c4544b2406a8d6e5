"""Weight-only quantization: weights in few bits, everything is computed in float.

``W ≈ s · (q − z)`` with a scale (and a zero point, unless symmetric) per group of inputs. Frantar et al. 2023 (GPTQ),
https://arxiv.org/abs/2210.17323; Badri & Shaji 2023 (HQQ), https://mobiusml.github.io/hqq_blog; Lin et al. 2023 (AWQ),
https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.quantization import QuantPlan, QuantScheme, TensorQuant, precision_name
from tersor.core.step import Kind, Step
from tersor.core.task import Role
from tersor.errors import ConfigError
from tersor.quantize import ranges
from tersor.quantize.grams import call_order, can_be_watched, gram_of
from tersor.quantize.modules import ModuleWeight, select, summary
from tersor.quantize.prepare import batches_of
from tersor.quantize.rounding.base import WeightGrid
from tersor.quantize.rounding.gptq import gptq
from tersor.quantize.rounding.hqq import hqq
from tersor.quantize.scale_columns import scaled_for_rounding

KERNEL_BLOCK = 16  # kernels want groups in multiples of it


class WeightOnly(Step):
    """Stores weights of linear, attention, recurrent and embedding layers in 2, 3, 4 or 8 bits.

    `group_size` neighbours among a layer's inputs share a scale; None: all of them. A layer whose inputs it does not
    divide takes the largest smaller group that kernels like, else one scale per output. Convolutions get 8 bits, one
    scale per output channel. `method`: `nearest`; `hqq` fits scales and zero points, without data; `gptq` repairs
    rounding errors on `samples` calibration examples, layer by layer; `awq` scales the columns that large inputs meet,
    where the inputs can be scaled down for free. `keep` leaves layers in float, by glob patterns
    over their paths.
    """

    name: ClassVar[str] = "quantize.weight_only"
    kind: ClassVar[Kind] = "quantize"

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=32, ge=2)
    symmetric: bool = False
    method: Literal["nearest", "gptq", "hqq", "awq"] = "nearest"
    range_method: Literal["minmax", "mse"] = "minmax"
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=16, ge=1)
    keep: tuple[str, ...] = Field(default=(), strict=False)

    @property
    def needs(self) -> frozenset[Role]:
        """The calibrate split, for `gptq`."""
        return frozenset({"calibrate"}) if self.method in {"gptq", "awq"} else frozenset()

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name("weight_only", packed=self.bits <= 4)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rounds a copy; the result carries the plan."""
        started = time.perf_counter()
        batches: list[Batch] = []
        module = copy.deepcopy(candidate.module).eval()
        scaled: list[str] = []
        if self.needs:
            split = context.task.require("calibrate", self.name)
            examples = batches_of(split, self.samples, self.batch_size)
            if self.method == "gptq":
                batches = examples()
            else:
                module, count = scaled_for_rounding(module, context, examples, self._nearest)
                scaled.append(f"columns scaled for their inputs at {count} places")
        chosen = select(
            module,
            self.name,
            example=context.task.example(2),
            output=context.task.output,
            keep=self.keep,
            kinds=("linear", "recurrent", "embedding", "convolution"),
        )
        formats, notes = self._formats(chosen)
        entries, unseen = self._round(module, chosen, formats, batches, context)
        if unseen:
            notes.append(f"no calibration example shows the inputs of {unseen}, rounded to nearest")
        plan = QuantPlan(tensors=[entries[weight.path] for weight in chosen], mode="weight_only", pack=self.bits <= 4)
        notes = [f"{summary(chosen, plan.weights, module)}, by {self.method}", *scaled, *notes]
        done = replace(candidate, module=module, plan=plan, simulation=None)
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)

    def _nearest(self, weight: Tensor) -> Tensor:
        """A weight `[O, K]` of a linear layer as `nearest` would round it."""
        inputs = weight.shape[1]
        group = None if self.group_size is None else fitting_group(inputs, self.group_size)
        scheme = QuantScheme(bits=self.bits, signed=self.symmetric, symmetric=self.symmetric)
        method: Any = ranges.mse if self.range_method == "mse" else ranges.minmax
        return WeightGrid.fitted(weight, scheme, 1 if group is None else inputs // group, method=method).nearest(weight)

    def _formats(self, chosen: list[ModuleWeight]) -> tuple[dict[str, _Format], list[str]]:
        """Bits and groups of each weight, and what a reader must know about them."""
        formats, notes = {}, []
        others: dict[str, list[str]] = {}
        fits = False
        for weight in chosen:
            if weight.kind == "convolution":
                formats[weight.path] = _Format(8, None, symmetric=True)
                continue
            inputs = weight.rows().shape[1]
            group = None if self.group_size is None else fitting_group(inputs, self.group_size)
            fits |= self.group_size is None or group == self.group_size or inputs <= self.group_size
            if group != self.group_size and inputs > (self.group_size or 0):
                others.setdefault("one scale per output" if group is None else f"groups of {group}", []).append(
                    weight.path
                )
            formats[weight.path] = _Format(self.bits, group, symmetric=self.symmetric)
        if not fits and any(weight.kind != "convolution" for weight in chosen):
            sizes = sorted({weight.rows().shape[1] for weight in chosen if weight.kind != "convolution"})
            raise ConfigError(
                f"WeightOnly.group_size: {self.group_size} divides the inputs of no layer, which are {sizes}; choose a "
                "divisor, multiples of 16 are fastest, or group_size=None for one scale per output"
            )
        notes += [f"{what} instead of {self.group_size}: {paths}" for what, paths in others.items()]
        if self.bits == 3:
            notes.append("3 bits are stored in 4: no kernel reads them denser")
        convolutions = sum(weight.kind == "convolution" for weight in chosen)
        if convolutions and self.bits != 8:
            notes.append(f"{convolutions} convolutions in int8, one scale per output channel")
        return formats, notes

    def _round(
        self,
        module: nn.Module,
        chosen: list[ModuleWeight],
        formats: dict[str, _Format],
        batches: list[Batch],
        context: Context,
    ) -> tuple[dict[str, TensorQuant], list[str]]:
        """Writes the rounded weights, in the order in which the model runs, so that later layers see earlier ones."""
        calls = call_order(module, chosen, batches[0]) if batches else {}
        order = {path: place for place, path in enumerate(calls)}
        entries, unseen = {}, []
        ordered = sorted(chosen, key=lambda weight: order.get(weight.module_path, -1))
        for done, weight in enumerate(ordered):
            form, gram = formats[weight.path], None
            if batches and weight.kind in ("linear", "recurrent"):
                known = weight.module_path in calls and can_be_watched(weight)
                gram = gram_of(module, weight, batches, calls[weight.module_path]) if known else None
                if gram is None:
                    unseen.append(weight.path)
            entries[weight.path] = self._round_one(weight, form, gram)
            context.progress(self.name, done + 1, len(ordered))
        return entries, unseen

    def _round_one(self, weight: ModuleWeight, form: _Format, gram: Tensor | None) -> TensorQuant:
        rows = weight.rows()
        scheme = weight.scheme(form.bits, symmetric=form.symmetric, group_size=form.group)
        groups = 1 if form.group is None else rows.shape[1] // form.group
        method: Any = ranges.mse if self.range_method == "mse" else ranges.minmax
        if self.method == "hqq" and weight.kind != "convolution":
            grid, values = hqq(rows, scheme, groups)
        else:
            grid = WeightGrid.fitted(rows, scheme, groups, method=method)
            values = grid.nearest(rows) if gram is None else gptq(rows, gram, grid)
        weight.write(values)
        return weight.entry(grid, form.group)


@dataclass(frozen=True)
class _Format:
    """Of one weight: bits, neighbours that share a scale (None: all inputs), and whether zero is in the middle."""

    bits: int
    group: int | None
    symmetric: bool


def fitting_group(inputs: int, wanted: int) -> int | None:
    """The wanted group where it divides the inputs, else the largest smaller divisor that is a multiple of 16.

    None, one scale per output, where there is no such divisor or the inputs are no more than one group.
    """
    if inputs <= wanted:
        return None
    if inputs % wanted == 0:
        return wanted
    fitting = [size for size in range(KERNEL_BLOCK, wanted, KERNEL_BLOCK) if inputs % size == 0]
    return fitting[-1] if fitting else None
