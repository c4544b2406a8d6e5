"""Corrects what rounding shifted: the mean of every channel, or its mean and variance.

Bias correction (Nagel et al. 2019, section 4.2, https://arxiv.org/abs/1906.04721): ``b' = b + E[y] − E[ŷ]``, where `y`
is what a layer gives in float and `ŷ` what it gives with everything before it rounded. With variances it is the
re-estimation of BatchNorm for a network in which BatchNorm is folded: ``ŷ' = (ŷ − E[ŷ]) · σ/σ̂ + E[y]``; the factor goes
into the scale of the weight's channel, its codes stay (Sun et al. 2019, https://arxiv.org/abs/1911.04173).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tersor.core.batch import Batch
from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.stream import Stream
from tersor.quantize.layers import Layer, bias_of, give_biases, layers, set_bias
from tersor.quantize.prepare import Batches, Prepared, along
from tersor.quantize.reference import Reference, float_reference

Correction = Literal["mean", "mean_and_variance"]
LARGEST = 2.0  # a factor beyond tells of a channel that rounding has all but silenced, not of its spread


def correct(prepared: Prepared, batches: Batches, what: Correction, reference: Reference | None = None) -> None:
    """Corrects the layers in their order, in place; all ranges must be set.

    Args:
        prepared: Biases and, with variances, the scales of weights change.
        batches: Examples.
        what: Means alone, or variances too.
        reference: The graph before its weights were rounded; None if they still are as they were.
    """
    give_biases(prepared)
    inputs = [tuple(batch.tensors().values()) for batch in _checked(batches)]
    exact, nodes = float_reference(prepared) if reference is None else reference
    with torch.no_grad():
        wanted, given = Stream(exact, inputs), Stream(prepared.simulation, inputs)
        for layer in layers(prepared):
            given.advance(layer.source)
            mean, spread = _moments(wanted.advance(nodes[layer.node.name]), layer)
            rounded_mean, rounded_spread = _moments(given.peek(layer.node), layer)
            bias = bias_of(prepared, layer)
            assert bias is not None  # noqa: S101 - given above
            if what == "mean_and_variance":
                factor = spread / rounded_spread
                usable = torch.isfinite(factor) & (factor < LARGEST) & (factor > 1 / LARGEST)
                factor = torch.where(usable, factor, 1.0)
                _stretch(prepared, layer, factor)
                bias, rounded_mean = bias * factor, rounded_mean * factor
            set_bias(prepared, layer, bias + mean - rounded_mean)
            given.advance(layer.node)


def _checked(batches: Batches) -> list[Batch]:
    found = batches()
    for index, batch in enumerate(found):
        batch.check_finite(f"calibration batch {index}")
    return found


def _moments(values: list[Tensor], layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, `[O]`, over everything else."""
    channels = torch.cat([value.movedim(layer.channel_dim, 0).flatten(1) for value in values], dim=1)
    return channels.mean(1), channels.std(1, correction=0)


def _stretch(prepared: Prepared, layer: Layer, factor: Tensor) -> None:
    """Multiplies the weight's channels and their scales alike, so that the codes stay."""
    quantizer = prepared.quantizer(layer.quantizer)
    weight = get_tensor(prepared.simulation, layer.weight).detach()
    rounded = quantizer(weight)
    set_parameter(prepared.simulation, layer.weight, rounded * along(factor, layer.rule.channel_axis, weight.ndim))
    quantizer.scale = quantizer.scale * factor
