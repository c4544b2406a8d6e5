"""A sparse weight as bytes, and back: what it would take to store it, by storing it.

One byte tells the form, and the smallest wins:

* dense: the values;
* bitmask: one bit per unit (an entry, or a block), then the values of the units that stay;
* N:M: `N` values of every `M`, each with ``⌈log₂ M⌉`` bits that tell its place (2 bits for 2:4).

Shapes: `O` outputs, `K` columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tersor.prune.patterns import Pattern, as_matrix, from_matrix

DENSE, BITMASK, N_M = range(3)


def encode(weight: Tensor, keep: Tensor, pattern: Pattern, output_dim: int = 0) -> bytes:
    """The entries that `keep` leaves of `weight` and where they stand; everything else is zero."""
    matrix = as_matrix(weight.detach().cpu(), output_dim)
    mask = as_matrix(keep.cpu(), output_dim)
    forms = [bytes([DENSE]) + _raw((matrix * mask).flatten()), _bitmask(matrix * mask, mask, pattern)]
    if pattern.n_m is not None and matrix.shape[1] % pattern.n_m[1] == 0:
        groups = mask.reshape(-1, pattern.n_m[1])
        if bool((groups.sum(1) <= pattern.n_m[0]).all()):
            forms.append(_n_m(matrix * mask, groups, *pattern.n_m))
    return min(forms, key=len)


def decode(data: bytes, like: Tensor, pattern: Pattern, output_dim: int = 0) -> Tensor:
    """What `encode` stored, of the shape and type of `like`."""
    form, body = data[0], data[1:]
    matrix = as_matrix(torch.zeros(like.shape, dtype=like.dtype), output_dim)
    outputs, inputs = matrix.shape
    if form == DENSE:
        matrix = _values(body, like.dtype).reshape(matrix.shape)
    elif form == BITMASK:
        rows, columns = (-(-outputs // pattern.size[0]), -(-inputs // pattern.size[1]))
        length = -(-rows * columns // 8)
        bits = np.unpackbits(np.frombuffer(body[:length], np.uint8), count=rows * columns)
        stays = torch.from_numpy(bits.astype(bool)).reshape(rows, columns)
        matrix[pattern.spread(stays, outputs, inputs)] = _values(body[length:], like.dtype)
    else:
        assert pattern.n_m is not None  # noqa: S101 - written by this pattern
        n, m = pattern.n_m
        count = outputs * inputs // m * n
        length = count * like.element_size()
        width = _width(m)
        digits = np.unpackbits(np.frombuffer(body[length:], np.uint8), count=count * width).reshape(count, width)
        places = torch.from_numpy(digits.astype(np.int64) @ (1 << np.arange(width)[::-1])).reshape(-1, n)
        groups = matrix.reshape(-1, m)
        matrix = groups.scatter(1, places, _values(body[:length], like.dtype).reshape(-1, n)).reshape(matrix.shape)
    return from_matrix(matrix, like, output_dim)


def _bitmask(matrix: Tensor, mask: Tensor, pattern: Pattern) -> bytes:
    stays = pattern.units(mask.float()) > 0
    bits = np.packbits(stays.flatten().numpy())
    return bytes([BITMASK]) + bits.tobytes() + _raw(matrix[pattern.spread(stays, *matrix.shape)])


def _n_m(matrix: Tensor, groups: Tensor, n: int, m: int) -> bytes:
    # Where fewer than N stay, zeros fill up: their places must differ from the others'.
    places = groups.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n].sort(1).values
    values = matrix.reshape(-1, m).gather(1, places)
    shifts = np.arange(_width(m))[::-1]
    bits = (places.flatten().numpy()[:, None] >> shifts) & 1
    return bytes([N_M]) + _raw(values.flatten()) + np.packbits(bits.astype(np.uint8).flatten()).tobytes()


def _width(m: int) -> int:
    return math.ceil(math.log2(m))


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _values(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
