"""AWQ on a whole model: scales up the columns that large inputs meet, where the inputs can be scaled down for free.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. The division goes into the LayerNorm, the RMSNorm's scale or the
layer that gives the inputs, so that the model's function stays; see `tersor.quantize.rounding.awq_scale`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersor.core.context import Context
from tersor.core.signature import dynamic_dimensions, input_names
from tersor.graph import capture
from tersor.graph.fold import get_tensor
from tersor.graph.stream import Stream
from tersor.probe.columns import columns
from tersor.quantize.equalize import scale_columns, weight_of
from tersor.quantize.prepare import CAPTURE_BATCH, Batches
from tersor.quantize.rounding import awq_scale
from tersor.quantize.smooth import divide, places

SEED = 0


def scaled_for_rounding(
    module: nn.Module, context: Context, batches: Batches, quantize: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, int]:
    """A copy that computes the same, with weights that lose less when they are rounded.

    Args:
        module: Must be one that `torch.export` can trace.
        context: Task and target.
        batches: Examples.
        quantize: Rounds a weight `[O, K]`.

    Returns:
        The copy, and at how many places something was scaled.

    Raises:
        CaptureError: if the model cannot be traced.
    """
    example = context.task.example(CAPTURE_BATCH)
    names = input_names(module, example)
    dynamic = dynamic_dimensions(names, context.target)
    graph_module = capture(module, example, names=names, dynamic=dynamic, output=context.task.output)
    where = places(graph_module)
    stream = Stream(graph_module, [tuple(batch.tensors().values()) for batch in batches()])
    found = []
    with torch.no_grad():
        for place in where:
            generator = torch.Generator().manual_seed(SEED)
            rows = torch.cat([columns(value, None, generator)[:, 0] for value in stream.advance(place.value)])
            weights = [weight_of(graph_module, reader)[1] for reader in place.readers]
            found.append(awq_scale(weights, rows.abs().mean(0), rows.T @ rows / len(rows), quantize))
    for place, scale in zip(where, found, strict=True):
        divide(graph_module, {}, place.giver, scale)
        for reader in place.readers:
            scale_columns(graph_module, {}, reader, scale)
    return _with_values_of(graph_module, module), len(where)


def _with_values_of(graph_module: nn.Module, module: nn.Module) -> nn.Module:
    done = copy.deepcopy(module)
    with torch.no_grad():
        for path, parameter in graph_module.named_parameters():
            own = get_tensor(done, path)
            if not torch.equal(own, parameter):
                own.copy_(parameter)
    return done
