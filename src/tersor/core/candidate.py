"""What flows through a recipe: the module plus everything declarative done to it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.quantization import QuantPlan
from tersor.core.report import Pruning, QuantizationRecord, StepRecord
from tersor.core.surgery import Surgery
from tersor.errors import NonFiniteError


@dataclass(frozen=True)
class Candidate:
    """A compressed model in the making. Steps return a new one; none changes the one it got.

    `tersor.compress` starts from one if a model was pruned before: `Candidate(model, surgeries=(report.surgery,))`.

    Attributes:
        module: The float model, a copy of the caller's; after quantization its weights have the values that the codes
            stand for, as far as the plan names them.
        masks: Parameter path -> boolean keep-mask of the parameter's shape; the masked entries are zero.
        surgeries: What was cut out of the caller's model, in this order, to get to `module`'s shapes.
        plan: What quantization decided, as data.
        simulation: The quantized model as PyTorch runs it (fake quantization), from which runtimes lower.
        history: What each step did.
    """

    module: nn.Module
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    surgeries: tuple[Surgery, ...] = ()
    plan: QuantPlan | None = None
    simulation: nn.Module | None = None
    history: tuple[StepRecord, ...] = ()

    @property
    def runnable(self) -> nn.Module:
        """What behaves like the deployed model: the quantized simulation, else the module."""
        return self.simulation if self.simulation is not None else self.module

    @property
    def precision(self) -> str:
        """`float32`, or what the plan asks of a runtime."""
        return "float32" if self.plan is None else self.plan.precision

    def for_weights(self) -> Candidate:
        """A copy whose module a step may change.

        After quantization it has the rounded weights and drops the plan: whatever changes weights makes the plan
        stale, so the recipe must quantize again.
        """
        return replace(self, module=copy.deepcopy(self.module), plan=None, simulation=None)

    def after(self, surgery: Surgery, module: nn.Module) -> Candidate:
        """The candidate once `surgery` has made `module` of its own module; the masks shrink alike."""
        masks = cut_masks(self.masks, surgery, module)
        return replace(self, module=module, masks=masks, surgeries=(*self.surgeries, surgery))

    def record(
        self,
        name: str,
        settings: Mapping[str, Any],
        seconds: float,
        notes: list[str],
        pruning: Pruning | None = None,
        quantization: QuantizationRecord | None = None,
    ) -> Candidate:
        """The same candidate with one more entry in its history."""
        entry = StepRecord(
            name=name,
            settings=dict(settings),
            seconds=seconds,
            notes=notes,
            pruning=pruning,
            quantization=quantization,
        )
        return replace(self, history=(*self.history, entry))


def cut_masks(masks: Mapping[str, Tensor], surgery: Surgery, module: nn.Module) -> dict[str, Tensor]:
    """Masks cut along with their parameters; those of parameters that are gone are dropped.

    Args:
        masks: Of the model before the surgery, `parameter path -> boolean mask`.
        surgery: What was cut.
        module: The model after the surgery.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first = {id(parameter): path for path, parameter in module.named_parameters()}  # a surgery names tied ones once
    result = {}
    for before, mask in masks.items():
        path = _renamed(before, surgery)
        if path not in parameters:
            continue
        kept = mask
        for cut in surgery.cuts:
            if cut.parameter in (before, first[id(parameters[path])]):
                kept = kept.index_select(cut.dim, torch.tensor(cut.kept, device=mask.device))
        result[path] = kept
    return result


def _renamed(path: str, surgery: Surgery) -> str:
    """What a parameter is called once lists of modules were numbered anew; empty if it is gone."""
    for shrink in surgery.shrunk:
        start = f"{shrink.path}.".lstrip(".")
        found = re.match(rf"({re.escape(start)}[^.]*?)(\d+)(\..*)", path)
        if found is not None:
            if int(found[2]) not in shrink.kept:
                return ""
            path = f"{found[1]}{shrink.kept.index(int(found[2]))}{found[3]}"
    return path


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeroes the masked entries of `module`'s parameters, in place."""
    with torch.no_grad():
        for path, mask in masks.items():
            module.get_parameter(path).mul_(mask)


def check_finite_weights(module: nn.Module) -> None:
    """Raises `NonFiniteError` naming the first parameter or buffer that holds NaN or Inf."""
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{path!r} must be finite, but {bad} of {tensor.numel()} values are NaN or Inf; "
                "the model was damaged before it came here: load a good checkpoint"
            )


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode that needs no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
