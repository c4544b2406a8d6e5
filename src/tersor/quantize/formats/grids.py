"""The numbers that a format can tell apart, in units of the scale: integers, a table of levels, or short floats.

Shapes: `R` regions, `N` entries of a region, `K` levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tersor.core.quantization import QuantScheme
from tersor.quantize.formats.packing import packed_bytes


class Grid(Protocol):
    """What `Quantized` asks of a format."""

    @property
    def name(self) -> str:
        """What it is called in print."""

    @property
    def bits(self) -> int:
        """Of one code."""

    @property
    def stored_bytes(self) -> int:
        """Of what is stored beside codes and scales."""

    def encode(self, rows: Tensor) -> Tensor:
        """Codes `[R, N]` of the nearest numbers; what is out of range saturates."""

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers `[R, N]` of codes."""

    def unsigned(self, codes: Tensor) -> Tensor:
        """Codes from 0 on, int32, as they are packed."""


@dataclass(frozen=True, eq=False)
class IntegerGrid:
    """``q − z``, q from `qmin` to `qmax`.

    Attributes:
        scheme: Bits, sign and granularity.
        zero_point: `[R, 1]`, None for symmetric schemes.
    """

    scheme: QuantScheme
    zero_point: Tensor | None

    @property
    def name(self) -> str:
        """Sign and symmetry."""
        words = ("signed" if self.scheme.signed else "unsigned", "symmetric" if self.scheme.symmetric else "affine")
        return f"uniform {' '.join(words)}"

    @property
    def bits(self) -> int:
        """Of one code."""
        return self.scheme.bits

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds the codes."""
        if self.scheme.bits > 8:
            return torch.int16 if self.scheme.signed else torch.uint16
        return torch.int8 if self.scheme.signed else torch.uint8

    @property
    def stored_bytes(self) -> int:
        """Zero points take as many bits as codes."""
        return 0 if self.zero_point is None else packed_bytes(self.zero_point.numel(), self.bits)

    def encode(self, rows: Tensor) -> Tensor:
        """``clamp(round(x) + z)``; halves go to the even code."""
        codes = rows.round() if self.zero_point is None else rows.round() + self.zero_point
        return codes.clamp(self.scheme.qmin, self.scheme.qmax).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """``q − z``."""
        return codes.to(dtype) if self.zero_point is None else codes.to(dtype) - self.zero_point

    def unsigned(self, codes: Tensor) -> Tensor:
        """``q − qmin``."""
        return codes.to(torch.int32) - self.scheme.qmin


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """A table of numbers; codes are places in it.

    Attributes:
        name: What it is called in print.
        bits: Of one code.
        levels: Ascending, `[K]` for all regions or `[R, K]`.
        entry_bytes: Of a stored level; 0 for tables that follow from a formula.
    """

    name: str
    bits: int
    levels: Tensor
    entry_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """The table."""
        return self.levels.numel() * self.entry_bytes

    def encode(self, rows: Tensor) -> Tensor:
        """The nearest level, of two equally near ones the lower; of equal levels always the first."""
        lower, upper = self.levels[..., :-1], self.levels[..., 1:]
        middle = lower + (upper - lower) / 2
        middle = torch.where(middle.isfinite(), middle, lower / 2 + upper / 2)  # the difference may overflow
        codes = torch.searchsorted(middle.contiguous(), rows.contiguous())
        return self._pick(torch.searchsorted(self.levels, self.levels), codes).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Looks the levels up."""
        return self._pick(self.levels, codes.long()).to(dtype)

    def unsigned(self, codes: Tensor) -> Tensor:
        """As they are."""
        return codes.to(torch.int32)

    def _pick(self, table: Tensor, codes: Tensor) -> Tensor:
        return table[codes] if table.ndim == 1 else table.gather(1, codes)


@dataclass(frozen=True, eq=False)
class FloatGrid:
    """A shorter floating-point type; codes are its bit patterns.

    Attributes:
        name: What it is called in print.
        storage: The type.
    """

    name: str
    storage: torch.dtype

    @property
    def bits(self) -> int:
        """Of one code."""
        return torch.finfo(self.storage).bits

    @property
    def stored_bytes(self) -> int:
        """Nothing."""
        return 0

    def encode(self, rows: Tensor) -> Tensor:
        """Rounds to the nearest, halves to even; saturates instead of becoming Inf or NaN."""
        largest = torch.finfo(self.storage).max
        pattern = torch.uint8 if self.bits == 8 else torch.int16
        return rows.clamp(-largest, largest).to(self.storage).view(pattern)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Reads the bit patterns."""
        return codes.view(self.storage).to(dtype)

    def unsigned(self, codes: Tensor) -> Tensor:
        """The bit patterns as numbers."""
        return codes.to(torch.int32) & ((1 << self.bits) - 1)
