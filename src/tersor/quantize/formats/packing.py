"""Codes of 1 to 16 bits as a dense stream of bytes, the lowest bit first.

Eight codes of `b` bits take `b` bytes: code `i` is bits `i · b` to `(i + 1) · b − 1` of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import ConfigError

BYTE = 8


def packed_bytes(count: int, bits: int) -> int:
    """``⌈count · bits / 8⌉``."""
    return -(-count * bits // BYTE)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of any shape.

    Args:
        codes: Integers from 0 to ``2^bits − 1``.
        bits: 1 to 16.

    Returns:
        uint8, `[packed_bytes(codes.numel(), bits)]`.

    Raises:
        ConfigError: if a code does not fit.
    """
    flat = codes.flatten().to(torch.int32)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << bits:
        raise ConfigError(
            f"pack: expected codes from 0 to {(1 << bits) - 1} ({bits} bits), got {int(flat.min())} to "
            f"{int(flat.max())}; subtract the smallest code first"
        )
    stream = ((flat[:, None] >> _places(bits, flat)) & 1).flatten()
    stream = functional.pad(stream, (0, -len(stream) % BYTE)).reshape(-1, BYTE)
    return (stream << _places(BYTE, flat)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack` made, int32 `[count]`.

    Raises:
        ConfigError: if there are not so many.
    """
    if len(packed) < packed_bytes(count, bits):
        raise ConfigError(
            f"unpack: expected {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits, got {len(packed)}"
        )
    stream = ((packed.to(torch.int32)[:, None] >> _places(BYTE, packed)) & 1).flatten()[: count * bits]
    return (stream.reshape(count, bits) << _places(bits, packed)).sum(1).to(torch.int32)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.int32, device=like.device)
