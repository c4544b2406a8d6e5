"""Gram matrices of the inputs and of the hidden states of recurrent layers.

Shapes: `B` batch, `T` time, `I` inputs, `H` hidden units, `D` directions, `L` layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]  # hidden states, and cells of an LSTM


def recurrent_rows(layer: nn.RNNBase, name: str, inputs: Tensor, state: Any = None) -> Tensor:
    """What the rows of one weight are multiplied with: inputs of its layer, or hidden states one step earlier.

    The layers below it are run one by one, with the weights that they have now.

    Args:
        layer: `nn.LSTM`, `nn.GRU` or `nn.RNN` without projections, in evaluation mode.
        name: `weight_ih_l0`, `weight_hh_l1_reverse` and so on.
        inputs: `[B, T, I]` as the layer takes them (`[T, B, I]` unless `batch_first`), or without batch.
        state: Initial hidden states `[L · D, B, H]`, of an LSTM with the cells, as the layer takes them; zeros if None.

    Returns:
        `[N, I]` or `[N, H]`, N = T · B.
    """
    part, _, place = name.removeprefix("weight_").partition("_l")
    level, _, reverse = place.partition("_")
    values = inputs.detach()
    start: State | None = None
    if state is not None:
        start = tuple(tensor.detach() for tensor in ((state,) if isinstance(state, Tensor) else state))
    if values.ndim == 2:
        values = values.unsqueeze(0 if layer.batch_first else 1)
        start = None if start is None else tuple(tensor.unsqueeze(1) for tensor in start)
    if layer.batch_first:
        values = values.transpose(0, 1)  # [T, B, I]
    directions = 2 if layer.bidirectional else 1
    with torch.no_grad():
        for below in range(int(level)):
            values = _run(layer, below, values, start)
        if part == "ih":
            return values.reshape(-1, values.shape[-1])
        outputs = _run(layer, int(level), values, start)  # [T, B, D · H]
        side = 1 if reverse else 0
        hidden = outputs[..., side * layer.hidden_size : (side + 1) * layer.hidden_size]
        first = torch.zeros_like(hidden[:1]) if start is None else start[0][int(level) * directions + side][None]
        earlier = torch.cat([hidden[1:], first]) if reverse else torch.cat([first, hidden[:-1]])
    return earlier.reshape(-1, layer.hidden_size)


def _run(layer: nn.RNNBase, level: int, values: Tensor, start: State | None) -> Tensor:
    """Output `[T, B, D · H]` of one of the layers."""
    options: dict[str, Any] = {"bias": layer.bias, "bidirectional": layer.bidirectional}
    if isinstance(layer, nn.RNN):
        options["nonlinearity"] = layer.nonlinearity
    kind: Any = next(kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, kind))
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights
        single: nn.RNNBase = kind(values.shape[-1], layer.hidden_size, **options)
    single.to(values.device, values.dtype)
    for name, parameter in single.named_parameters():
        parameter.copy_(getattr(layer, name.replace("_l0", f"_l{level}")))
    if start is None:
        output: Tensor = single(values)[0]
        return output
    directions = 2 if layer.bidirectional else 1
    states = [tensor[level * directions : (level + 1) * directions].contiguous() for tensor in start]
    output = single(values, tuple(states) if len(states) > 1 else states[0])[0]
    return output
