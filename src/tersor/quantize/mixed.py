"""Mixed precision: every layer gets the width that it needs, within a limit on size.

How much each layer loses is measured, or estimated from second derivatives (Dong et al. 2019, HAWQ,
https://arxiv.org/abs/1905.03696); an integer program chooses (Yao et al. 2021, HAWQ-V3,
https://arxiv.org/abs/2011.10680).
"""

from __future__ import annotations

import glob
import time
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.quantize.allocation import allocate, average_of
from tersor.quantize.record import with_losses
from tersor.quantize.sensitivity import Measure, Options, Sensitivity, measure_layers
from tersor.quantize.static import Static
from tersor.quantize.widths import FLOAT, Widths


class Mixed(Static):
    """Static quantization with a width for each layer's weights, chosen within one limit.

    `average_bits` limits the bits per parameter, `max_bytes` the bytes of the packed weights with their scales,
    `size_ratio` these bytes as float32 bytes / allowed bytes. `choices` are the widths; 32 leaves a layer in float.
    `measure` and `sensitivity_samples` are those of `tersor.quantize.sensitivity`. The first and the last layer keep
    `edge_bits` unless `edges` is `choose`; `overrides` fixes layers. Everything else is as in `quantize.static`.
    """

    name: ClassVar[str] = "quantize.mixed"

    average_bits: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)
    size_ratio: float | None = Field(default=None, gt=0)
    choices: list[int] = Field(default=[2, 3, 4, 5, 6, 8])
    measure: Measure = "output"
    sensitivity_samples: int = Field(default=128, ge=1)
    edges: Literal["keep", "choose"] = "keep"

    @field_validator("choices")
    @classmethod
    def _are_widths(cls, choices: list[int]) -> list[int]:
        if not choices or any(bits != FLOAT and not 2 <= bits <= 8 for bits in choices):
            raise ValueError(f"expected widths of 2 to 8 bits, or {FLOAT} for float")
        return choices

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        limits = {name: getattr(self, name) for name in ("average_bits", "max_bytes", "size_ratio")}
        if sum(value is not None for value in limits.values()) != 1:
            raise ValueError(f"set one of {', '.join(limits)}")
        if "weight_bits" in self.model_fields_set and self.weight_bits != Widths.model_fields["weight_bits"].default:
            raise ValueError("weight_bits is chosen for each layer; limit choices, or fix layers with overrides")
        return self

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Measures, chooses, quantizes."""
        started = time.perf_counter()
        fixed = [self.edge_bits, *self.overrides.values()]
        bits = tuple(sorted({width for width in (*self.choices, *fixed) if width != FLOAT}))
        options = Options(bits, self.measure, self.sensitivity_samples)
        found = measure_layers(candidate, context, options, self.name)
        size = self._bytes(found)
        widths = allocate(found, max_bytes=size, average_bits=self.average_bits, choices=self._free(found))
        done = Static.apply(self.model_copy(update={"overrides": exactly(found, widths)}), candidate, context)
        notes = [
            f"{average_of(found, widths):.2f} bits per weight on average, {found.unit} of single layers adds up to "
            f"{sum(row.loss_at(widths[row.layer]) for row in found.rows):.3g}",
            "widths, most sensitive layer first: "
            + ", ".join(f"{row.layer or '(model)'} {widths[row.layer]}" for row in found.ranked()),
            *done.history[-1].notes,
        ]
        seconds, settings = time.perf_counter() - started, self.model_dump(mode="json")
        record = with_losses(done.history[-1], found).model_copy(
            update={"settings": settings, "seconds": seconds, "notes": notes}
        )
        return replace(done, history=(*candidate.history, record))

    def _bytes(self, found: Sensitivity) -> float | None:
        if self.size_ratio is None:
            return self.max_bytes
        return 4 * sum(row.parameters for row in found.rows) / self.size_ratio

    def _free(self, found: Sensitivity) -> dict[str, list[int]]:
        """The widths that each layer may get."""
        result = {}
        for row in found.rows:
            result[row.layer] = self.choices
            if self.edges == "keep" and row.edge:
                result[row.layer] = [self.edge_bits]
            for pattern, width in reversed(self.overrides.items()):
                if any(fnmatchcase(module, pattern) for module in row.modules):
                    result[row.layer] = [width]
        return result


def exactly(found: Sensitivity, widths: Mapping[str, int]) -> dict[str, int]:
    """Widths as overrides, each for one module, whatever characters its path has."""
    rows = {row.layer: row for row in found.rows}
    return {glob.escape(module): bits for layer, bits in widths.items() for module in rows[layer].modules}
