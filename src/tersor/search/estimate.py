"""What a recipe would leave of a model, without training it: parameters, multiply-accumulates, bytes of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.config import Config
from tersor.core.context import Context
from tersor.core.recipe import Recipe
from tersor.core.step import Step
from tersor.errors import UnsupportedError
from tersor.measure import mac_counts
from tersor.prune import DepthStep
from tersor.quantize import Dynamic, Half, WeightOnly
from tersor.quantize.modules import Kind, ModuleWeight, quantizable
from tersor.quantize.weight_only import fitting_group

FLOAT_BYTES = 4
PACKED = 4  # bits up to which codes are packed


class Estimate(Config):
    """Of this model, before and after; bytes are those of the weights, their scales included, without the graph."""

    parameters: int
    parameters_after: int
    macs: int
    macs_after: int
    float_bytes: int
    bytes_after: int


def estimate(model: nn.Module, recipe: Recipe, context: Context, *, macs: int) -> Estimate:
    """Cuts a copy as the recipe does, without training it, and counts bytes at the widths of its quantization.

    Args:
        model: In evaluation mode; stays as it is.
        recipe: Its cutting steps run, quickly: nothing is verified or refitted, which changes no shape.
        context: Of the run that is to come.
        macs: Multiply-accumulates of the model at batch 1.

    Raises:
        TersorError: if a step cannot be taken with this model and this task.
    """
    candidate = Candidate(model)  # steps cut copies
    for step in recipe.steps:
        if step.kind == "prune":
            candidate = _quick(step).apply(candidate, context)
    cut, parameters = candidate.module is not model, _count(model)
    return Estimate(
        parameters=parameters,
        parameters_after=_count(candidate.module),
        macs=macs,
        macs_after=mac_counts(candidate.module, context.task.example(1))[""] if cut else macs,
        float_bytes=FLOAT_BYTES * parameters,
        bytes_after=_bytes(
            candidate.module, next((step for step in reversed(recipe.steps) if step.kind == "quantize"), None)
        ),
    )


def _quick(step: Step) -> Step:
    """The step without what takes long and changes no shape."""
    changed: dict[str, object] = {}
    if "verify" in type(step).model_fields:
        changed["verify"] = False if isinstance(step, DepthStep) else "off"
    if "compensate" in type(step).model_fields:
        changed["compensate"] = False
    return step.model_copy(update=changed)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module, step: Step | None) -> int:
    total = _count(model)
    if step is None:
        return FLOAT_BYTES * total
    if isinstance(step, Half):
        return FLOAT_BYTES // 2 * total
    kinds, weights = _kinds(step), quantizable(model)
    taken = [weight for weight in weights if weight.kind in kinds]
    if not taken:
        raise UnsupportedError(f"{step.name} takes {', '.join(kinds)} layers, and {type(model).__name__} has none")
    edges = _edges(taken)
    rest = total - sum(weight.weight.numel() for weight in taken)
    return FLOAT_BYTES * rest + sum(_stored(weight, step, edge=weight in edges) for weight in taken)


def _kinds(step: Step) -> tuple[Kind, ...]:
    """Layers whose weights a quantization rounds; see `docs/runtimes.md`."""
    if isinstance(step, Dynamic):
        return ("linear", "recurrent", *(("embedding",) if step.embeddings else ()))
    if isinstance(step, WeightOnly):
        return ("linear", "recurrent", "embedding", "convolution")
    return ("linear", "embedding", "convolution")


def _edges(weights: Sequence[ModuleWeight]) -> list[ModuleWeight]:
    """The first and the last layer, look-up tables aside."""
    inner = [weight for weight in weights if weight.kind != "embedding"]
    return [inner[0], inner[-1]] if inner else []


def _stored(weight: ModuleWeight, step: Any, *, edge: bool) -> int:
    rows, inputs = weight.rows().shape
    bits, groups, zero_points = 8, 1, 0
    if isinstance(step, WeightOnly) and weight.kind != "convolution":
        bits = 4 if step.bits == 3 else step.bits  # no kernel reads 3 bits denser
        group = None if step.group_size is None else fitting_group(inputs, step.group_size)
        groups = 1 if group is None else inputs // group
        zero_points = 0 if step.symmetric else 1
    elif getattr(step, "pack", False) and weight.kind != "embedding":
        width = step.edge_bits if edge else step.weight_bits
        bits = width if width <= PACKED else 8
    codes: int = -(-rows * inputs * bits // 8)
    return codes + rows * groups * (FLOAT_BYTES + zero_points)
