"""Rounds the weights of a prepared graph by what the layers see, one layer after the other.

Every layer is rounded for the inputs that the already rounded layers before it give (Frantar et al. 2023,
https://arxiv.org/abs/2210.17323); only one Gram matrix is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tersor.errors import NonFiniteError
from tersor.graph.fold import get_tensor, set_parameter
from tersor.graph.stream import Stream
from tersor.probe.columns import columns
from tersor.quantize.layers import Layer, layers
from tersor.quantize.prepare import Batches, Prepared
from tersor.quantize.rounding import WeightGrid, gptq, obq
from tersor.quantize.rounding.base import least_error

SecondOrder = Literal["gptq", "obq"]
Method = Callable[[Tensor, Tensor, WeightGrid], Tensor]
METHODS: dict[SecondOrder, Method] = {"gptq": gptq, "obq": obq}
SEED = 0


def round_weights(prepared: Prepared, batches: Batches, method: SecondOrder) -> None:
    """Replaces the weights by points of their grids, in place; all ranges must be set."""
    inputs = [tuple(batch.tensors().values()) for batch in batches()]
    stream = Stream(prepared.simulation, inputs)
    with torch.no_grad():
        for layer in layers(prepared):
            gram = _gram(stream.advance(layer.source), layer)
            weight = get_tensor(prepared.simulation, layer.weight).detach()
            grid = grid_of(prepared, layer)
            parts = zip(weight.flatten(1).chunk(len(gram)), gram, _parts(grid, len(gram)), strict=True)
            rounded = torch.cat([_rounded(part, own, points, METHODS[method]) for part, own, points in parts])
            set_parameter(prepared.simulation, layer.weight, rounded.reshape(weight.shape))
            stream.advance(layer.node)


def _rounded(weight: Tensor, gram: Tensor, grid: WeightGrid, method: Method) -> Tensor:
    """By the method; but what pruning made zero stays zero."""
    found, pruned = method(weight, gram, grid), weight == 0
    if not bool(pruned.any()):
        return found
    return least_error(weight, gram, found.masked_fill(pruned, 0), grid.nearest(weight))


def grid_of(prepared: Prepared, layer: Layer) -> WeightGrid:
    """The grid of a layer's weight, a scale per row."""
    quantizer = prepared.quantizer(layer.quantizer)
    return WeightGrid(quantizer.scheme, quantizer.scale[:, None], quantizer.zero_point[:, None].float())


def _parts(grid: WeightGrid, count: int) -> list[WeightGrid]:
    scales, zero_points = grid.scale.chunk(count), grid.zero_point.chunk(count)
    return [WeightGrid(grid.scheme, scale, zero) for scale, zero in zip(scales, zero_points, strict=True)]


def _gram(values: list[Tensor], layer: Layer) -> Tensor:
    """``X Xᵀ / n`` of what the layer gets, `[G, K, K]`."""
    generator, window = torch.Generator().manual_seed(SEED), layer.window
    total, count = torch.zeros(()), 0
    for index, value in enumerate(values):
        rows = columns(value, window, generator)  # [N, G, K]
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(f"calibration batch {index}: NaN or Inf flows into layer {layer.module!r}")
        total = total + torch.einsum("ngk,ngl->gkl", rows, rows)
        count += len(rows)
    return total / count
