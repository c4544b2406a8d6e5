"""The first half of every quantization on a captured graph: capture, fold, place, measure ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.context import Context
from tersor.core.signature import dynamic_dimensions, input_names
from tersor.core.split import Split
from tersor.errors import DataError, UnsupportedError
from tersor.graph import FakeQuantize, capture, fold_batch_norm
from tersor.graph.attention_parts import take_attention_apart
from tersor.graph.fold import FoldedNorm, get_tensor
from tersor.probe import histograms
from tersor.quantize import ranges
from tersor.quantize.placement import Placement, place
from tersor.quantize.ranges.base import Points, RangeMethod
from tersor.quantize.styles import Style, style_for
from tersor.quantize.widths import Widths

CAPTURE_BATCH = 2  # a batch of one would be baked into the graph
Batches = Callable[[], list[Batch]]


@dataclass(frozen=True)
class Prepared:
    """A captured graph with its quantizers, as yet disabled.

    Attributes:
        simulation: The graph.
        placement: Where the quantizers are.
        folded: Every BatchNorm that went into a weight, by the weight's path.
        units: Weight path -> what the stored weight was multiplied by to become the graph's; lies over the weight.
        style: How the runtime wants it.
    """

    simulation: fx.GraphModule
    placement: Placement
    folded: dict[str, FoldedNorm]
    units: dict[str, Tensor]
    style: Style

    def quantizer(self, path: str) -> FakeQuantize:
        """The quantizer at `path`."""
        found = self.simulation.get_submodule(path)
        assert isinstance(found, FakeQuantize)  # noqa: S101 - placed there
        return found


def prepare(
    candidate: Candidate,
    context: Context,
    step: str,
    widths: Widths,
    *,
    change: Callable[[fx.GraphModule, dict[str, Tensor]], None] | None = None,
) -> Prepared:
    """Captures the candidate's module, folds BatchNorm and places quantizers as the target wants them.

    Args:
        candidate: Its module stays as it is.
        context: Data and target.
        step: For messages.
        widths: Bits.
        change: Called with the folded graph and its units before quantizers are placed, e.g. to equalize.

    Raises:
        UnsupportedError: if the model is not float32, or there is nothing to quantize.
        CaptureError: if the model cannot be traced.
    """
    module = candidate.module
    kinds = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    if kinds - {torch.float32}:
        raise UnsupportedError(
            f"{step} takes float32 models, {type(module).__name__} has {sorted(map(str, kinds))}; "
            "call model.float() first"
        )
    example = context.task.example(CAPTURE_BATCH)
    names = input_names(module, example)
    dynamic = dynamic_dimensions(names, context.target)
    simulation = capture(module, example, names=names, dynamic=dynamic, output=context.task.output)
    folded = fold_batch_norm(simulation)
    units = {path: along(norm.factor, norm.axis, get_tensor(simulation, path).ndim) for path, norm in folded.items()}
    take_attention_apart(simulation)
    if change is not None:
        change(simulation, units)
    style = style_for(context.target)
    placement = place(simulation, widths, style)
    if not placement.weights:
        if widths.overrides:
            raise UnsupportedError(f"{step}: the overrides {widths.overrides} keep every layer in float; free one")
        raise UnsupportedError(
            f"{step} found no layer that it can quantize in {type(module).__name__} for {context.target.runtime}: it "
            "covers convolutions, linear layers and embeddings; this model has none in its forward pass"
        )
    return Prepared(simulation, placement, folded, units, style)


def along(values: Tensor, axis: int, dimensions: int) -> Tensor:
    """A vector laid along one of a tensor's dimensions, so that both can be multiplied."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(dimensions)])


def batches_of(split: Split, samples: int, batch_size: int) -> Batches:
    """A function that gives the first `samples` examples, batch by batch, as often as it is called."""
    chosen = range(min(samples, len(split)))
    return lambda: [split.batch(chosen[start : start + batch_size]) for start in chosen[::batch_size]]


def set_activation_ranges(prepared: Prepared, method: str, batches: Batches) -> list[str]:
    """Calibrates the activations; returns the names of those that no example reached, which stay float.

    Raises:
        NonFiniteError: naming batch and value.
        DataError: if a range is too wide for float32.
    """
    placed = prepared.placement.activations
    found = histograms(prepared.simulation, placed, batches, counts=method not in {"minmax", "moving_average"})
    unreached = []
    for path, name in placed.items():
        quantizer, histogram = prepared.quantizer(path), found[name]
        if histogram.low > histogram.high:
            unreached.append(name)
            continue
        if not histogram.high - histogram.low < torch.finfo(torch.float32).max:
            raise DataError(
                f"calibration range of {name!r} is [{histogram.low}, {histogram.high}]: too wide for float32"
            )
        quantizer.set_range(*getattr(ranges, method)(Points.of_histogram(histogram), quantizer.scheme))
    return unreached


def set_weight_ranges(prepared: Prepared, method: RangeMethod | None = None) -> None:
    """Sets the weights' scales; without a method, minimum to maximum at 8 and 7 bits and least squares below."""
    for path, parameter in prepared.placement.weights.items():
        quantizer = prepared.quantizer(path)
        axis = quantizer.scheme.axis
        assert axis is not None  # noqa: S101 - weights have one scale per channel
        rows = get_tensor(prepared.simulation, parameter).detach().movedim(axis, 0).flatten(1)
        chosen = method or (ranges.minmax if quantizer.scheme.bits >= 7 else ranges.mse)
        quantizer.set_range(*chosen(Points.of_rows(rows), quantizer.scheme))
