"""Quantization: number formats, ranges, placement, and the steps that use them."""

from tersor.quantize.static import Static

__all__ = ["Static"]
