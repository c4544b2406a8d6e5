"""A tensor in a short number format: what every format returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.errors import ConfigError
from tersor.quantize.formats.grids import Grid, IntegerGrid, LevelGrid
from tersor.quantize.formats.packing import pack, packed_bytes
from tersor.quantize.formats.regions import regions, working_dtype


@dataclass(frozen=True, eq=False, repr=False)
class Quantized:
    """Codes, and what turns them back into numbers: ``x' = scale · grid[code]``.

    Attributes:
        codes: The tensor's shape, in the smallest integer type that holds them.
        grid: The numbers that the format can tell apart, in units of the scale.
        granularity: Which entries share a scale.
        dtype: The tensor's type.
        scale: One per region, in a shape that lies over the tensor (`Granularity`); None if the format has none.
        scale_code: The scales in a format of their own, less their mean; None if they are stored as they are.
    """

    codes: Tensor
    grid: Grid
    granularity: Granularity
    dtype: torch.dtype
    scale: Tensor | None = None
    scale_code: Quantized | None = None

    @classmethod
    def of(cls, tensor: Tensor, grid: Grid, granularity: Granularity, scale: Tensor | None = None) -> Quantized:
        """Rounds a tensor to a grid whose scales, `[R]`, are known."""
        shape = tuple(tensor.shape)
        over = None if scale is None else granularity.grid(scale, shape)
        empty = torch.empty(shape, dtype=torch.uint8, device=tensor.device)
        blank = cls(empty, grid, granularity, tensor.dtype, over)
        return cls(blank.encode(tensor), grid, granularity, tensor.dtype, over)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.codes.shape)

    @property
    def bits(self) -> int:
        """Of one code."""
        return self.grid.bits

    @property
    def zero_point(self) -> Tensor | None:
        """Codes of zero, laid over the tensor like `scale`; None for formats without."""
        if not isinstance(self.grid, IntegerGrid) or self.grid.zero_point is None:
            return None
        return self.granularity.grid(self.grid.zero_point[:, 0], self.shape).to(torch.int32)

    @property
    def levels(self) -> Tensor | None:
        """The table of levels, `[K]`, or one per region laid over the tensor `[…, K]`; None for formats without."""
        if not isinstance(self.grid, LevelGrid):
            return None
        levels = self.grid.levels
        return levels if levels.ndim == 1 else self.granularity.grid(levels, self.shape)

    def encode(self, tensor: Tensor) -> Tensor:
        """Codes of another tensor of this shape under the same scales; of `dequantize()` they are `codes` again.

        Raises:
            ConfigError: for another shape.
            NonFiniteError: for NaN or Inf.
        """
        if tuple(tensor.shape) != self.shape:
            raise ConfigError(f"encode: expected a tensor of shape {self.shape}, got {tuple(tensor.shape)}")
        rows = regions(tensor, self.granularity, self.grid.name)
        if self.scale is not None:
            rows = rows / self._scales()
        return self.granularity.restore(self.grid.encode(rows), self.shape)

    def dequantize(self) -> Tensor:
        """The rounded tensor, in its shape and type; what its type cannot hold saturates."""
        rows = self.grid.decode(self.granularity.rows(self.codes), working_dtype(self.dtype))
        if self.scale is not None:
            rows = rows * self._scales()
        limits = torch.finfo(self.dtype)
        return self.granularity.restore(rows.clamp(limits.min, limits.max).to(self.dtype), self.shape)

    def packed(self) -> Tensor:
        """The codes as a dense stream of bytes (`tersor.quantize.formats.packing`)."""
        return pack(self.grid.unsigned(self.codes), self.bits)

    @property
    def size_bytes(self) -> int:
        """Packed codes, scales, zero points, and the table where it does not follow from a formula."""
        scales = 0 if self.scale is None else self.scale.numel() * self.scale.element_size()
        if self.scale is not None and self.scale_code is not None:
            scales = self.scale_code.size_bytes + self.scale.element_size()  # codes and the mean
        return packed_bytes(self.codes.numel(), self.bits) + scales + self.grid.stored_bytes

    def error(self, reference: Tensor) -> float:
        """``‖x' − x‖₂ / ‖x‖₂``; 0 where both are zero."""
        true = reference.detach().double()
        noise, signal = float((self.dequantize().double() - true).norm()), float(true.norm())
        return noise / signal if signal else (math.inf if noise else 0.0)

    def sqnr(self, reference: Tensor) -> float:
        """Signal-to-quantization-noise ratio in dB, ``−20 log₁₀ error``."""
        error = self.error(reference)
        return -20 * math.log10(error) if error else math.inf

    def __str__(self) -> str:
        """`uniform signed symmetric, 8 bits, per tensor: float32 [16, 3, 3, 3] in 436 bytes, 25 %`."""
        whole = self.codes.numel() * torch.finfo(self.dtype).bits // 8
        share = f", {self.size_bytes / whole:.0%} of before" if whole else ""
        return (
            f"{self.grid.name}, {self.bits} bits, {self.granularity}: {str(self.dtype).removeprefix('torch.')} "
            f"{list(self.shape)} in {self.size_bytes:,} bytes{share}"
        )

    __repr__ = __str__

    def _scales(self) -> Tensor:
        """`[R, 1]`, where the arithmetic is done."""
        assert self.scale is not None  # noqa: S101 - its callers asked
        return self.granularity.flat(self.scale, self.shape)[:, None]
