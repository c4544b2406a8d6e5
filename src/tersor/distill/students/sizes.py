"""Shares of numbers of layers, heads and channels."""

from __future__ import annotations

BLOCK = 8
FROM = 32  # below, rounding to whole blocks would change too much


def share(count: int, part: float) -> int:
    """The nearest whole number to `part` of `count`, at least 1."""
    return max(1, int(part * count + 0.5))


def rounded(count: int, part: float) -> int:
    """The same, from 32 on as a multiple of 8, which kernels like; `count` itself for all of it."""
    if part == 1:
        return count
    return BLOCK * share(count, part / BLOCK) if part * count >= FROM else share(count, part)


def spread(count: int, kept: int) -> list[int]:
    """`kept` of `count` positions, evenly; the first and, from two on, the last among them."""
    return [(2 * index * (count - 1) + kept - 1) // (2 * (kept - 1)) for index in range(kept)] if kept > 1 else [0]
