"""Quantized weights as integers, found in an exported file by their content.

Exporters rename, transpose and stack parameters. But the rounded values themselves survive: the bytes of each weight,
of its transpose and of the gate-reordered stacks of recurrent layers are the keys under which its codes are found.

Shapes: `D` directions, `H` hidden units, `I` inputs. A *grid* holds one number per group, in a shape that lies over
the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.quantization import QuantPlan, TensorQuant
from tersor.errors import ExportError

Array = np.ndarray[Any, Any]
Key = tuple[tuple[int, ...], bytes]
# Which of PyTorch's gates stands at each place in ONNX: i o f c of i f g o; z r n of r z n.
GATES: dict[type[nn.Module], tuple[int, ...]] = {nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2), nn.RNN: (0,)}
LARGEST_ERROR = 1e-5  # between values and codes, as a share of the scale


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """``scale · (codes − zero_point)``.

    Attributes:
        name: Under which it is stored.
        paths: The parameters that it holds.
        codes: Of the weight's shape, int16.
        scale: A grid, float32; may be negative once a BatchNorm is folded in.
        zero_point: A grid, int16.
        bits: 2 to 8.
        signed: Whether the codes start below zero.
    """

    name: str
    paths: frozenset[str]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    signed: bool

    @classmethod
    def of(cls, quant: TensorQuant, values: Tensor) -> StoredWeight:
        """Reads the codes off the rounded values.

        Raises:
            ExportError: if the values are not on the plan's grid.
        """
        scheme, shape = quant.scheme, tuple(values.shape)
        granularity = scheme.granularity
        scale = granularity.grid(torch.tensor(quant.scale, dtype=torch.float32), shape)
        zero_point = granularity.grid(torch.tensor(quant.zero_point, dtype=torch.int16), shape)
        steps = values.detach() / expanded(scale, shape)
        codes = steps.round() + expanded(zero_point, shape)
        off = float((steps - steps.round()).abs().max()) if values.numel() else 0.0
        if not off <= LARGEST_ERROR * 2**scheme.bits or not bool(
            ((codes >= scheme.qmin) & (codes <= scheme.qmax)).all()
        ):
            raise ExportError(
                f"the weight {quant.name!r} is not on the grid of its quantization plan (off by {off:.2g} of a step); "
                "it was changed after quantization: quantize again as the last step"
            )
        return cls(
            quant.name, frozenset({quant.name}), codes.to(torch.int16), scale, zero_point, scheme.bits, scheme.signed
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.codes.shape)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not bool(self.zero_point.any())

    @property
    def axes(self) -> list[int]:
        """The dimensions along which scales differ."""
        return [axis for axis, size in enumerate(self.scale.shape) if size > 1]

    @property
    def blocked(self) -> int | None:
        """The axis along which neighbours share a scale; None without groups."""
        found = [axis for axis in self.axes if self.scale.shape[axis] != self.shape[axis]]
        return found[0] if found else (self.axes[-1] if len(self.axes) > 1 else None)

    def through(self, name: str, change: Callable[[Tensor], Tensor]) -> StoredWeight:
        """The same after an operation that moves entries but never mixes groups: codes and grids take it alike."""
        parts = (self.codes, self.scale, self.zero_point)
        codes, scale, zero_point = (change(part).contiguous() for part in parts)
        return replace(self, name=name, codes=codes, scale=scale, zero_point=zero_point)

    def transposed(self) -> StoredWeight:
        """`[K, N]` of `[N, K]`."""
        return self.through(f"{self.name}.T", lambda part: part.T)

    def scaled(self, factor: Tensor, axis: int) -> StoredWeight:
        """With every index along `axis` multiplied by its factor, which only the scales feel."""
        shape = [-1 if dim == axis else 1 for dim in range(self.codes.ndim)]
        return replace(self, scale=self.scale * factor.float().reshape(shape))


def expanded(grid: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A grid laid over a tensor of `shape`, one number per entry."""
    for axis, size in enumerate(shape):
        if grid.shape[axis] not in (1, size):
            grid = grid.repeat_interleave(size // grid.shape[axis], dim=axis)
    return grid.expand(shape)


def key_of(array: Array) -> Key:
    """Shape and a hash of every bit."""
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


@dataclass(frozen=True)
class Found:
    """How a tensor of the file is made of a stored weight."""

    weight: StoredWeight
    turned: bool = False


Table = dict[Key, Found]


def table_of(module: nn.Module, plan: QuantPlan, folded: Mapping[str, tuple[Tensor, int, Tensor]]) -> Table:
    """Every form in which an exporter may write the plan's weights.

    Args:
        module: Holds the rounded weights.
        plan: How they are rounded.
        folded: Path -> factor, axis and value of the weights that a BatchNorm was folded into.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    stored: dict[int, StoredWeight] = {}
    table: Table = {}
    for path, quant in plan.weights.items():
        if path not in parameters:
            raise ExportError(f"the plan names {path!r}, which the model does not have; quantize again")
        weight, values = StoredWeight.of(quant, parameters[path]), parameters[path].detach()
        stored[id(parameters[path])] = weight
        if path in folded:
            factor, axis, values = folded[path]
            weight = weight.scaled(factor, axis)
        _add_with_transpose(table, values, weight)
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            _add_recurrent(table, layer, stored)
        elif isinstance(layer, nn.MultiheadAttention) and isinstance(layer.in_proj_weight, nn.Parameter):
            _add_projections(table, layer.in_proj_weight, stored)
    return table


def _add(table: Table, values: Tensor, found: Found) -> None:
    """Weights of equal content have equal codes: whichever is in the file stands for all of them."""
    key = key_of(values.detach().numpy())
    if key in table:
        both = table[key].weight.paths | found.weight.paths
        found = replace(table[key], weight=replace(table[key].weight, paths=both))
    table[key] = found


def _add_with_transpose(table: Table, values: Tensor, weight: StoredWeight) -> None:
    _add(table, values, Found(weight))
    if values.ndim == 2 and values.shape[0] != 1 and values.shape[1] != 1:
        _add(table, values.T, Found(weight, turned=True))
    elif values.ndim == 2:  # the transpose has the same bytes, only its shape differs
        table.setdefault(key_of(values.detach().T.numpy()), Found(weight, turned=True))


def _add_recurrent(table: Table, layer: nn.RNNBase, stored: Mapping[int, StoredWeight]) -> None:
    """ONNX's `W` and `R`, `[D, gates · H, I]`, of each layer."""
    kind = next((kind for kind in GATES if isinstance(layer, kind)), None)
    if kind is None:
        return
    order = torch.cat([torch.arange(gate * layer.hidden_size, (gate + 1) * layer.hidden_size) for gate in GATES[kind]])
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    for level in range(layer.num_layers):
        for side in ("ih", "hh"):
            parameters = [getattr(layer, f"weight_{side}_l{level}{suffix}") for suffix in suffixes]
            if not all(id(parameter) in stored for parameter in parameters):
                continue
            values = torch.stack([parameter.detach()[order] for parameter in parameters])
            parts = [stored[id(parameter)].through("", lambda part: part[order]) for parameter in parameters]
            if len({part.scale.shape for part in parts}) == 1:
                _add(table, values, Found(_stack([stored[id(p)] for p in parameters], parts)))


def _stack(originals: list[StoredWeight], parts: list[StoredWeight]) -> StoredWeight:
    return replace(
        originals[0],
        name=f"{originals[0].name}.gates",
        paths=frozenset().union(*(original.paths for original in originals)),
        codes=torch.stack([part.codes for part in parts]),
        scale=torch.stack([part.scale for part in parts]),
        zero_point=torch.stack([part.zero_point for part in parts]),
    )


def _add_projections(table: Table, packed: nn.Parameter, stored: Mapping[int, StoredWeight]) -> None:
    """Queries, keys and values of attention, in case the exporter split them."""
    weight = stored.get(id(packed))
    if weight is None:
        return
    rows = len(packed) // 3
    for part, name in enumerate("qkv"):
        chosen = slice(part * rows, (part + 1) * rows)

        def some(tensor: Tensor, chosen: slice = chosen) -> Tensor:
            return tensor[chosen] if len(tensor) > 1 else tensor

        _add_with_transpose(table, packed.detach()[chosen], weight.through(f"{weight.name}.{name}", some))
