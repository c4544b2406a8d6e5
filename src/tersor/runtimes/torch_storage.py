"""Weights in few bits in a safetensors file, and back.

A quantized weight is three tensors: its codes under its own name, and the grids of its scales and zero points under
`NAME:scale` and `NAME:zero_point`. Codes of packed plans take 4 bits, two in a byte, counted from the smallest code.
What a plan casts is stored in the shorter type. The file's metadata hold the plan's precision and packed shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.core.quantization import QuantPlan
from tersor.runtimes.stored_weights import StoredWeight, expanded

SCALE, ZERO_POINT = ":scale", ":zero_point"
PRECISION, PACKED = "precision", "packed"  # metadata: a name; path -> shape of its codes, as JSON
NIBBLE = 4


class Stored(NamedTuple):
    """What a file holds: plain tensors and quantized weights by path, and the precision that the plan asked for."""

    tensors: dict[str, Tensor]
    weights: dict[str, StoredWeight]
    precision: str


def write(module: nn.Module, plan: QuantPlan, path: Path) -> None:
    """Writes every parameter and buffer; tied ones once, under their first name.

    Raises:
        ExportError: if a weight is not on the grid of its plan.
        SafetensorError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    seen: set[int] = set()
    short = {name: getattr(torch, plan.mode) for name in plan.casts}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        quant = plan.weights.get(name)
        if quant is None:
            tensors[name] = tensor.detach().to(short.get(name, tensor.dtype))
            continue
        weight = StoredWeight.of(quant, tensor)
        codes, zero_point = weight.codes, weight.zero_point
        if plan.pack and weight.bits <= NIBBLE:
            shapes[name] = list(codes.shape)
            codes, zero_point = _packed(codes - quant.scheme.qmin), zero_point - quant.scheme.qmin
        kind = torch.int8 if weight.signed and name not in shapes else torch.uint8
        tensors |= {name: codes.to(kind), name + SCALE: weight.scale, name + ZERO_POINT: zero_point.to(kind)}
    metadata = {"format": "pt", PRECISION: plan.precision, PACKED: json.dumps(shapes)}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata)


def read(path: Path) -> Stored:
    """What `write`, or `safetensors` alone, has written.

    Raises:
        SafetensorError: if the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        shapes = json.loads(metadata.get(PACKED, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    quantized = {}
    for name in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        codes, scale, zero_point = (tensors.pop(name + part) for part in ("", SCALE, ZERO_POINT))
        signed, bits = codes.dtype is torch.int8, NIBBLE if name in shapes else 8
        if name in shapes:
            codes = _unpacked(codes, shapes[name])
        codes, zero_point = codes.to(torch.int16), zero_point.to(torch.int16)
        quantized[name] = StoredWeight(name, frozenset({name}), codes, scale, zero_point, bits, signed)
    return Stored(tensors, quantized, metadata.get(PRECISION, "float32"))


def decoded(weight: StoredWeight) -> Tensor:
    """``scale · (codes − zero_point)`` in float32, of the weight's shape."""
    scale, zero_point = (expanded(grid, weight.shape) for grid in (weight.scale, weight.zero_point))
    return scale * (weight.codes - zero_point)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the module of the same names; of tied ones a single name suffices.

    Raises:
        RuntimeError: if names or shapes differ.
    """
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    state = module.state_dict(keep_vars=True)
    known = {id(state[name]) for name in tensors if name in state}
    missing = [name for name in missing if name not in state or id(state[name]) not in known]
    if missing or unexpected:
        raise RuntimeError(f"missing are {missing}, nobody asked for {unexpected}")


def _packed(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, two in a byte, the first one low."""
    flat = codes.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return flat[::2] | (flat[1::2] << NIBBLE)


def _unpacked(stored: Tensor, shape: list[int]) -> Tensor:
    pairs = torch.stack([stored & 15, stored >> NIBBLE], 1).flatten()
    count = torch.Size(shape).numel()
    return pairs[:count].reshape(shape)
