"""Operators that move values without changing them."""

from torch import ops

_aten = ops.aten

TRANSPARENT = frozenset(
    {
        _aten.view.default,
        _aten.reshape.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.squeeze.dim,
        _aten.unsqueeze.default,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.pad.default,  # pads with zero, which every scheme represents exactly
        _aten.constant_pad_nd.default,
        _aten.contiguous.default,
        _aten.clone.default,
        _aten.dropout.default,
    }
)
SHARED = frozenset({_aten.cat.default})
