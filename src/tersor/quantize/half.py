"""Shorter floats: parameters in float16 or bfloat16, decoded when the file is loaded, computed with in float32.

Half the bytes at next to no loss. The processors that the runtimes were tried on have no faster kernels for them.
Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740; bfloat16: Kalamkar et al. 2019,
https://arxiv.org/abs/1905.12322.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.quantization import QuantPlan, precision_name
from tersor.core.step import Kind, Step
from tersor.errors import UnsupportedError
from tersor.quantize.formats import bfloat16, float16

FORMATS = {"float16": float16, "bfloat16": bfloat16}


class Half(Step):
    """Stores every floating-point parameter in 16 bits; needs no data.

    `float16` keeps 11 significant bits and saturates at 65,504, `bfloat16` keeps 8 and float32's range.
    """

    name: ClassVar[str] = "quantize.half"
    kind: ClassVar[Kind] = "quantize"

    format: Literal["float16", "bfloat16"] = "float16"

    @property
    def precision(self) -> str:
        """What the target must be able to run."""
        return precision_name(self.format, packed=False)

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Rounds a copy."""
        started = time.perf_counter()
        module, saturated = copy.deepcopy(candidate.module), 0
        casts = []
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                if parameter.dtype is torch.float32:
                    rounded = FORMATS[self.format](parameter).dequantize()
                    saturated += int((parameter.abs() > torch.finfo(getattr(torch, self.format)).max).sum())
                    parameter.copy_(rounded)
                    casts.append(path)
        if not casts:
            raise UnsupportedError(f"{self.name}: {type(module).__name__} has no float32 parameter")
        notes = [f"{len(casts)} parameters in {self.format}"]
        if saturated:
            notes.append(f"weights reduced to what {self.format} can hold: {saturated} were larger")
        done = replace(candidate, module=module, plan=QuantPlan(tensors=[], mode=self.format, casts=casts))
        return done.record(self.name, self.model_dump(mode="json"), time.perf_counter() - started, notes)
