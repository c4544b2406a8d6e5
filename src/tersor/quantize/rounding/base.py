"""The grid that weights are rounded to, and what the methods share.

Shapes: `O` outputs (rows), `K` inputs (columns), `G` groups of a row, each of `K / G` neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.core.granularity import Granularity
from tersor.core.quantization import QuantScheme
from tersor.errors import ConfigError, NonFiniteError
from tersor.probe.hessian import checked
from tersor.quantize import ranges
from tersor.quantize.formats.regions import regions
from tersor.quantize.ranges.base import Points


def rounded(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """``scale · (clamp(round(values / scale) + zero_point, qmin, qmax) − zero_point)``; everything broadcasts."""
    codes = ((values / scale).round() + zero_point).clamp(scheme.qmin, scheme.qmax)
    return (codes - zero_point) * scale


def check_parameters(scheme: QuantScheme, scale: Tensor, zero_point: Tensor) -> None:
    """Checks that scales can be divided by and that zero points are codes.

    Raises:
        ConfigError: otherwise, and if a symmetric scheme has zero points other than 0.
        NonFiniteError: for NaN or Inf.
    """
    if not bool(torch.isfinite(scale).all() & torch.isfinite(zero_point).all()):
        raise NonFiniteError("scale and zero point must be finite; check the weight that they were fitted to")
    if bool((scale <= 0).any()):
        raise ConfigError(f"expected scales above zero, got one of {float(scale.min())}")
    outside = (zero_point != zero_point.round()) | (zero_point < scheme.qmin) | (zero_point > scheme.qmax)
    if scheme.symmetric:
        outside = outside | (zero_point != 0)
    if bool(outside.any()):
        raise ConfigError(
            f"zero points must be {'0' if scheme.symmetric else f'integers from {scheme.qmin} to {scheme.qmax}'}, got "
            f"{float(zero_point[outside][0])}"
        )


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The points that a weight matrix `[O, K]` may take: ``scale · (q − zero_point)``, `q` an integer code.

    Granularity is told by the shapes: `G = 1` is one scale per row, `G = K` one per weight. What the scheme says
    about it is not looked at.

    Attributes:
        scheme: Bits, signs and symmetry.
        scale: `[O, G]`, float32 or float64.
        zero_point: `[O, G]`, whole numbers among the codes; 0 if the scheme is symmetric.

    Raises:
        ConfigError: if the shapes differ, scales are not above zero or zero points are no codes.
        NonFiniteError: for NaN or Inf.
    """

    scheme: QuantScheme
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.scale.ndim != 2 or self.scale.shape != self.zero_point.shape or not self.scale.numel():
            raise ConfigError(
                f"WeightGrid: expected scale and zero_point [O, G], got {tuple(self.scale.shape)} and "
                f"{tuple(self.zero_point.shape)}"
            )
        check_parameters(self.scheme, self.scale, self.zero_point)

    @classmethod
    def fitted(
        cls,
        weight: Tensor,
        scheme: QuantScheme,
        groups: int = 1,
        *,
        method: Callable[[Points, QuantScheme], tuple[Tensor, Tensor]] = ranges.minmax,
        importance: Tensor | None = None,
    ) -> WeightGrid:
        """The grid that covers the range which a range method finds for each group.

        Args:
            weight: `[O, K]`; float16, bfloat16, float32 or float64.
            scheme: Bits, signs and symmetry.
            groups: `G`, a divisor of `K`.
            method: One of `tersor.quantize.ranges`.
            importance: What an error costs, `[K]` or `[O, K]`, not negative, e.g. the diagonal of the Gram matrix;
                for the methods that weigh errors (`mse`, `entropy`).

        Raises:
            ConfigError: if shapes do not fit, or an unsigned symmetric scheme meets negative weights.
            NonFiniteError: for NaN or Inf.
        """
        rows, columns = matrix(weight, "WeightGrid.fitted").shape
        if groups < 1 or columns % groups:
            raise ConfigError(f"WeightGrid.fitted: expected groups to divide the {columns} columns, got {groups}")
        regional = (rows * groups, columns // groups)
        points = Points.of_rows(regions(weight, Granularity.channel(), "WeightGrid.fitted").reshape(regional))
        if scheme.symmetric and not scheme.signed and bool((points.low < 0).any()):
            raise ConfigError("WeightGrid.fitted: unsigned symmetric codes hold no negative weights; sign the scheme")
        if importance is not None:
            counts = _importance(importance, weight).to(points.values.dtype).reshape(regional)
            points = replace(points, counts=Points.of_rows(counts).values)  # the same sample of long rows
        low, high = method(points, scheme)
        scale, zero_point = scheme.parameters(low, high, smallest=torch.finfo(low.dtype).tiny)
        return cls(scheme, scale.reshape(rows, groups), zero_point.reshape(rows, groups))

    def columns(self, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of some of a weight's `count` columns, `[O, len(indices)]` each."""
        group = indices.to(self.scale.device) // (count // self.scale.shape[1])
        return self.scale[:, group], self.zero_point[:, group]

    def expanded(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight, `[O, K]` each.

        Raises:
            ConfigError: if the groups do not divide the columns.
        """
        groups = self.scale.shape[1]
        if columns < groups or columns % groups:
            raise ConfigError(f"WeightGrid: expected a multiple of {groups} columns, one per group, got {columns}")
        return self.columns(torch.arange(columns), columns)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest points, `[O, K]` int64; halves go to the even code.

        Raises:
            ConfigError: if the shapes do not fit.
            NonFiniteError: for NaN or Inf.
        """
        self.check(weight)
        scale, zero_point = self.expanded(weight.shape[1])
        codes = ((weight.detach() / scale).round() + zero_point).clamp(self.scheme.qmin, self.scheme.qmax)
        return codes.to(torch.int64)

    def values(self, codes: Tensor) -> Tensor:
        """What codes `[O, K]` stand for, of the scale's type.

        Raises:
            ConfigError: if the shapes do not fit.
        """
        self._fits(codes)
        scale, zero_point = self.expanded(codes.shape[1])
        return (codes - zero_point) * scale

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded to nearest, of its type. Errors as in `codes`."""
        return self.values(self.codes(weight)).to(weight.dtype)

    def check(self, weight: Tensor) -> None:
        """Checks that a weight can be rounded to this grid.

        Raises:
            ConfigError: if the shapes do not fit.
            NonFiniteError: for NaN or Inf.
        """
        self._fits(weight)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"a weight of shape {tuple(weight.shape)} holds NaN or Inf; repair it first")

    def _fits(self, weight: Tensor) -> None:
        rows, columns = matrix(weight, "WeightGrid").shape
        if rows != len(self.scale) or columns % self.scale.shape[1]:
            raise ConfigError(
                f"WeightGrid: scales {tuple(self.scale.shape)} are for {len(self.scale)} rows and a multiple of "
                f"{self.scale.shape[1]} columns, got a weight {(rows, columns)}; the grid belongs to another weight"
            )


def matrix(weight: Tensor, caller: str) -> Tensor:
    """The weight itself.

    Raises:
        ConfigError: unless it is `[O, K]` and not empty.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ConfigError(
            f"{caller}: expected a weight [O, K], not empty, got {tuple(weight.shape)}; see a convolution as a matrix "
            "with flatten(1), and take its groups one by one"
        )
    return weight


def problem(weight: Tensor, gram: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Copies in the working precision; of the Gram matrix with a mean diagonal of 1, so that no size overflows.

    Raises:
        ConfigError: if the shapes do not fit.
        NonFiniteError: for NaN or Inf in the weight; those of the Gram matrix are found where it is factorised.
    """
    work = checked(weight, gram)
    work = work.to(torch.promote_types(work.dtype, grid.scale.dtype))
    grid.check(weight)
    gram = gram.detach().to(work.dtype)
    size = float(gram.diagonal().double().mean())
    return work, gram / size if size > 0 else gram.clone()


def least_error(weight: Tensor, gram: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of each row that of two roundings whose outputs err less, `[O, K]`: ``δ · gram · δᵀ``; the second of equals."""
    gram = gram.double()
    errors = []
    for found in (first, second):
        change = (found - weight.detach()).double()
        errors.append(((change @ gram) * change).sum(1, keepdim=True))
    return torch.where(errors[0] < errors[1], first, second)


def _importance(importance: Tensor, weight: Tensor) -> Tensor:
    if importance.shape not in {weight.shape, weight.shape[1:]}:
        raise ConfigError(
            f"importance: expected shape [K] or [O, K] of a weight {tuple(weight.shape)}, got {tuple(importance.shape)}"
        )
    if not bool(torch.isfinite(importance).all()):
        raise NonFiniteError("importance holds NaN or Inf; check the data that it was measured on")
    if bool((importance < 0).any()):
        raise ConfigError(f"importance must not be negative, got {float(importance.min())}")
    return importance.detach().expand_as(weight)
