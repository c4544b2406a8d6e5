"""Integer initialisers and the nodes that decode them.

Shapes: `N` outputs, `K` inputs of a matrix product, `B` blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir

from tersor.runtimes.stored_weights import Array, StoredWeight, expanded

FLOAT = 1  # onnx.TensorProto.FLOAT
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


class Storage:
    """Adds constants and nodes to one ONNX graph; what has the same name is stored once."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def constant(self, name: str, array: Array) -> Any:
        """The initialiser of that name."""
        if name not in self.graph.initializers:
            tensor = onnx_ir.tensor(array, name=name)
            self.graph.register_initializer(onnx_ir.val(name, const_value=tensor))
        return self.graph.initializers[name]

    def node(self, operator: str, inputs: list[Any], before: Any, /, domain: str = "", **attributes: Any) -> Any:
        """The first output of a new node in front of `before`; None: in front of everything."""
        made = onnx_ir.node(operator, inputs, attributes=attributes, domain=domain)
        if before is None:
            self.graph.insert_before(self.graph[0], made)
        else:
            before.graph.insert_before(before, made)
        return made.outputs[0]

    def replace(self, node: Any, value: Any) -> None:
        """Lets `value` stand for the first output of `node`, which goes; graph outputs keep their names."""
        old = node.outputs[0]
        graph = node.graph
        value.shape, value.type = old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        name, old.name = old.name, None
        graph.remove(node, safe=True)
        value.name = name


def stored_type(weight: StoredWeight, *, pack: bool) -> Any:
    """The element type of the codes: four bits if they fit and are to be packed, a byte otherwise."""
    if pack and weight.bits <= 4:
        return (onnx_ir.DataType.INT4 if weight.signed else onnx_ir.DataType.UINT4).numpy()
    return np.int8 if weight.signed else np.uint8


def dequantized(storage: Storage, weight: StoredWeight, *, pack: bool) -> Any:
    """The weight as `DequantizeLinear` gives it: runtimes look for that.

    Groups need opset 21, as do codes of four bits.
    """
    kind, name = stored_type(weight, pack=pack), weight.name
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    shape = weight.shape
    attributes: dict[str, Any] = {}
    blocked = weight.blocked
    if blocked is not None:
        attributes = {"axis": blocked, "block_size": shape[blocked] // scale.shape[blocked]}
        whole = (*shape[:blocked], scale.shape[blocked], *shape[blocked + 1 :])
        scale, zero_point = expanded(scale, whole), expanded(zero_point, whole)
    elif weight.axes:
        attributes = {"axis": weight.axes[0]}
        scale, zero_point = scale.flatten(), zero_point.flatten()
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    inputs = [
        storage.constant(f"{name}.q", codes.numpy().astype(kind)),
        storage.constant(f"{name}.scale", np.ascontiguousarray(scale.numpy())),
    ]
    if not weight.symmetric or not weight.signed:
        inputs.append(storage.constant(f"{name}.zero", np.ascontiguousarray(zero_point.numpy()).astype(kind)))
    return storage.node("DequantizeLinear", inputs, None, **attributes)


def dequantized_rows(storage: Storage, weight: StoredWeight, *, pack: bool) -> Any:
    """Stacked weights `[D, R, K]`, by way of their rows: `DequantizeLinear` knows scales along one axis only."""
    whole = weight.shape
    scale = expanded(weight.scale, (*whole[:2], weight.scale.shape[2]))
    zero_point = expanded(weight.zero_point, (*whole[:2], weight.scale.shape[2]))
    rows = StoredWeight(
        weight.name,
        weight.paths,
        weight.codes.flatten(0, 1),
        scale.flatten(0, 1),
        zero_point.flatten(0, 1),
        weight.bits,
        weight.signed,
    )
    shape = storage.constant(f"{weight.name}.shape", np.array(whole, np.int64))
    decoded = dequantized(storage, rows, pack=pack)
    return storage.node("Reshape", [decoded, shape], storage.graph[1])


def decoded_at_load(storage: Storage, weight: StoredWeight, *, pack: bool) -> Any:
    """The weight by `Cast` and `Mul`, which ONNX Runtime computes once, when it loads the file.

    `DequantizeLinear` would run at every call, and keep convolutions and recurrent layers from arranging their weights.
    """
    kind, name, shape = stored_type(weight, pack=pack), weight.name, weight.shape
    codes = storage.constant(f"{name}.q", weight.codes.numpy().astype(kind))
    scale, zero_point = weight.scale, weight.zero_point
    grouped = [dim for dim, size in enumerate(shape) if scale.shape[dim] not in (1, size)]
    steps: list[tuple[str, Any]] = [("Cast", None)]  # first: other operators know no codes of four bits
    if grouped:
        (axis,) = grouped
        count = scale.shape[axis]
        split = (*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
        steps.append(("Reshape", storage.constant(f"{name}.split", np.array(split, np.int64))))
        scale, zero_point = scale.unsqueeze(axis + 1), zero_point.unsqueeze(axis + 1)
    if not weight.symmetric:
        steps.append(("Sub", storage.constant(f"{name}.zero", np.ascontiguousarray(zero_point.float().numpy()))))
    steps.append(("Mul", storage.constant(f"{name}.scale", np.ascontiguousarray(scale.numpy()))))
    if grouped:
        steps.append(("Reshape", storage.constant(f"{name}.shape", np.array(shape, np.int64))))
    value, first = codes, storage.graph[0]
    for operator, other in steps:
        if operator == "Cast":
            value = storage.node("Cast", [value], first, to=FLOAT)
        else:
            value = storage.node(operator, [value, other], first)
    return value


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix `[N, K]` in the blocks of `MatMulNBits` and `GatherBlockQuantized`.

    Attributes:
        codes: Packed, `[N, B, block_size · bits / 8]` uint8, the first code in the lowest bits.
        scale: `[N, B]`.
        zero_point: Packed along `B`, uint8; None where every one is the middle code.
        bits: 2, 4 or 8.
        block_size: A power of two.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    bits: int
    block_size: int


def in_blocks(weight: StoredWeight) -> Blocks | None:
    """The matrix in kernels' blocks; None if its groups do not fit: they must be multiples of 16.

    A group may be several blocks; a single group per row may end in a block that is not full.
    """
    rows, columns = weight.shape
    scale = expanded(weight.scale, (rows, weight.scale.shape[1]))
    groups = scale.shape[1]
    size = columns // groups
    if groups == 1:
        block = min(128, max(SMALLEST_BLOCK, 1 << (columns - 1).bit_length()))
    else:
        block = min(LARGEST_BLOCK, size & -size)  # the largest power of two that divides a group
    if block < SMALLEST_BLOCK:
        return None
    bits = 2 if weight.bits == 2 else (4 if weight.bits <= 4 else 8)
    blocks = -(-columns // block)
    middle = 1 << (bits - 1)
    shift = middle if weight.signed else 0
    zero_point = expanded(weight.zero_point, scale.shape)
    each = np.arange(blocks) * block // size if groups > 1 else np.zeros(blocks, np.int64)
    codes = np.zeros((rows, blocks * block), np.uint8)
    codes[:, :columns] = weight.codes.numpy() + shift
    zeros = (zero_point.numpy()[:, each] + shift).astype(np.uint8)
    return Blocks(
        _packed(codes.reshape(rows, blocks, block), bits),
        np.ascontiguousarray(scale.numpy()[:, each]),
        None if bool((zeros == middle).all()) else _packed(zeros, bits),
        bits,
        block,
    )


def _packed(codes: Array, bits: int) -> Array:
    """Several codes to a byte along the last axis, the first in the lowest bits."""
    each = 8 // bits
    missing = -codes.shape[-1] % each
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint8)
    for place in range(each):
        packed |= codes[..., place::each] << (bits * place)
    return packed
