"""Histograms of the values that flow through chosen modules, in two passes: exact range first, then counts.

Shapes: `H` bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import NonFiniteError

BINS = 1024
SAMPLE = 1 << 16  # values counted per call; the range is exact, the shape needs no more
MOMENTUM = 0.9


@dataclass
class Histogram:
    """Counts `[H]` of values in equal bins over `[low, high]`.

    `average_low` and `average_high` are exponential moving averages of the ends of what each call brought.
    """

    low: float = float("inf")
    high: float = float("-inf")
    average_low: float = float("nan")
    average_high: float = float("nan")
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def widen(self, values: Tensor) -> None:
        """First pass: takes the range in; raises `ValueError` on NaN or Inf."""
        low, high = (float(bound) for bound in torch.aminmax(values.detach()))
        if not math.isfinite(low + high):
            raise ValueError("NaN or Inf")
        if self.low > self.high:
            self.average_low, self.average_high = low, high
        self.average_low += (1 - MOMENTUM) * (low - self.average_low)
        self.average_high += (1 - MOMENTUM) * (high - self.average_high)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, values: Tensor) -> None:
        """Second pass: counts, of large tensors an evenly spaced sample."""
        step = max(1, values.numel() // SAMPLE) | 1  # odd, so that it does not fall in step with the layout
        sample = values.detach().float().flatten()[::step]
        if self.high > self.low:
            self.counts += torch.histc(sample, BINS, min=self.low, max=self.high)
        else:
            self.counts[0] += values.numel()

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, `[H]`, float64."""
        step = (self.high - self.low) / BINS
        return self.low + step * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def histograms(
    model: nn.Module,
    groups: Mapping[str, str],
    batches: Callable[[], Iterable[Batch]],
    *,
    counts: bool = True,
) -> dict[str, Histogram]:
    """Histograms of the inputs of `model`'s submodules.

    Args:
        model: Takes a batch's tensors by position.
        groups: Submodule path -> name of the histogram; several paths may share one.
        batches: Called once per pass.
        counts: False skips the second pass: only the range is known.

    Returns:
        Histogram by name; a module that was never reached leaves `low > high`.

    Raises:
        NonFiniteError: naming the batch and the module at which NaN or Inf appeared.
    """
    result = {name: Histogram() for name in groups.values()}
    _sweep(model, groups, batches, {name: histogram.widen for name, histogram in result.items()})
    if counts:
        _sweep(model, groups, batches, {name: histogram.count for name, histogram in result.items()})
    return result


def _sweep(
    model: nn.Module,
    groups: Mapping[str, str],
    batches: Callable[[], Iterable[Batch]],
    take: Mapping[str, Callable[[Tensor], None]],
) -> None:
    where = {"batch": 0}

    def hook_for(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            try:
                take[groups[path]](inputs[0])
            except ValueError:
                raise NonFiniteError(
                    f"calibration batch {where['batch']} produced NaN or Inf at {groups[path]!r}; "
                    "check the data and the model's weights"
                ) from None

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in groups]
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches()):
                where["batch"] = index
                batch.check_finite(f"calibration batch {index}")
                model(*batch.tensors().values())
    finally:
        for handle in handles:
            handle.remove()
