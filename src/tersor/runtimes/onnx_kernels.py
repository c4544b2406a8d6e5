"""Puts quantized weights into an exported graph: for OpenVINO as compressed constants, for ONNX Runtime as kernels.

Shapes: `N` outputs, `K` inputs of a matrix product, `V` rows of an embedding, `D` directions, `H` hidden units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from torch import Tensor

from tersor.errors import ExportError
from tersor.runtimes.onnx_storage import (
    FLOAT,
    Blocks,
    Storage,
    decoded_at_load,
    dequantized,
    dequantized_rows,
    in_blocks,
)
from tersor.runtimes.stored_weights import Found, StoredWeight, Table, expanded, key_of

MICROSOFT = "com.microsoft"


class Compressed:
    """Every weight is one constant behind a `DequantizeLinear`, in the orientation that it has in PyTorch.

    OpenVINO keeps it compressed and fuses the decoding into matrix products and look-ups, transposed or not.
    """

    def __init__(self, graph: Any, *, pack: bool) -> None:
        self.graph, self.storage, self.pack = graph, Storage(graph), pack
        self.decoded: dict[str, Any] = {}

    def store(self, table: Table) -> frozenset[str]:
        """Replaces the float initialisers whose content is in the table; tells the parameters that were found."""
        matches = []
        for value in list(self.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or not value.uses():
                continue
            found = table.get(key_of(tensor.numpy()))
            if found is not None:
                matches.append((value, found))
        for value, found in matches:
            self.substitute(value, found, matches)
            if not value.uses():
                del self.graph.initializers[value.name]
        return frozenset().union(*(found.weight.paths for _, found in matches))

    def substitute(self, value: Any, found: Found, matches: list[tuple[Any, Found]]) -> None:
        """Lets the integer form stand for a float initialiser."""
        value.replace_all_uses_with(self.whole(found))

    def whole(self, found: Found) -> Any:
        """The decoded weight as a value of the graph; one per weight and orientation."""
        weight = found.weight
        name = f"{weight.name}.T" if found.turned else weight.name
        if name not in self.decoded:
            if found.turned:
                straight = self.whole(Found(weight))
                self.decoded[name] = self._after(straight, "Transpose", [straight], perm=[1, 0])
            else:
                self.decoded[name] = self.decode(weight)
        return self.decoded[name]

    def decode(self, weight: StoredWeight) -> Any:
        """The float tensor, of the weight's shape."""
        make = dequantized_rows if len(weight.shape) == 3 and weight.name.endswith(".gates") else dequantized
        return make(self.storage, weight, pack=self.pack)

    def _after(self, value: Any, operator: str, inputs: list[Any], **attributes: Any) -> Any:
        made = onnx_ir.node(operator, inputs, attributes=attributes)
        producer = value.producer()
        producer.graph.insert_after(producer, made)
        return made.outputs[0]


class Kernels(Compressed):
    """ONNX Runtime: a kernel that takes the codes where there is one, decoding when the file is loaded elsewhere."""

    def __init__(self, graph: Any, *, pack: bool, dynamic: bool) -> None:
        super().__init__(graph, pack=pack)
        self.dynamic = dynamic
        self.rounded: dict[Any, tuple[Any, Any, Any]] = {}
        self.pending: dict[str, StoredWeight] = {}

    def decode(self, weight: StoredWeight) -> Any:
        """The float tensor, computed when the file is loaded."""
        return decoded_at_load(self.storage, weight, pack=self.pack)

    def substitute(self, value: Any, found: Found, matches: list[tuple[Any, Found]]) -> None:
        """Each user gets its kernel; what has none gets the decoded weight."""
        looked_up = any(
            other.weight.name == found.weight.name and any(user.op_type == "Gather" for user, _ in tensor.uses())
            for tensor, other in matches
        )
        for user, index in list(value.uses()):
            if user.op_type == "Transpose" and found.weight.codes.ndim == 2 and _turns(user):
                self.substitute(user.outputs[0], Found(found.weight, not found.turned), matches)
                if not user.outputs[0].uses() and not user.outputs[0].is_graph_output():
                    user.graph.remove(user, safe=True)
                continue
            if not self._kernel(user, index, found, looked_up=looked_up):
                user.replace_input_with(index, self.whole(found))

    def _kernel(self, user: Any, index: int, found: Found, *, looked_up: bool) -> bool:
        if user.op_type in {"MatMul", "Gemm"} and index == 1 and len(found.weight.shape) == 2:
            return self._product(user, found, looked_up=looked_up)
        if user.op_type == "Gather" and index == 0 and not found.turned and _axis(user) == 0:
            return self._look_up(user, found.weight)
        if user.op_type == "LSTM" and index == 1 and self.dynamic:
            return self._lstm(user)
        return False

    # --- matrix products

    def _product(self, user: Any, found: Found, *, looked_up: bool) -> bool:
        turned = found.turned
        bias = None
        if user.op_type == "Gemm":
            plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
            if any(name in user.attributes and user.attributes[name].value != value for name, value in plain.items()):
                return False
            transposed = "transB" in user.attributes and bool(user.attributes["transB"].value)
            turned ^= transposed
            bias = user.inputs[2] if len(user.inputs) > 2 else None
        # `turned`: the operand `[K, N]` is the transpose of the stored weight `[N, K]`
        made = self._rounded_product if self.dynamic else self._block_product
        output = made(user, found.weight, turned=turned, looked_up=looked_up)
        if output is None:
            return False
        if bias is not None:
            output = self.storage.node("Add", [output, bias], user)
        self.storage.replace(user, output)
        return True

    def _rounded_product(self, user: Any, weight: StoredWeight, *, turned: bool, looked_up: bool) -> Any:
        """The form that ONNX Runtime fuses to DynamicQuantizeMatMul and MatMulIntegerToFloat."""
        matrix = weight.transposed() if turned else weight
        if not weight.signed or not weight.symmetric or any(axis != 1 for axis in matrix.axes) or matrix.blocked:
            return None
        if turned and looked_up:  # one copy for both: turned when the file is loaded
            straight = self.storage.constant(f"{weight.name}.q", weight.codes.numpy().astype(np.int8))
            codes = self.storage.node("Transpose", [straight], user, perm=[1, 0])
        else:
            codes = self.storage.constant(f"{matrix.name}.q", matrix.codes.numpy().astype(np.int8))
        scale = self.storage.constant(f"{matrix.name}.scale", matrix.scale.flatten().numpy())
        values, size, zero = self._rounded_input(user.inputs[0])
        product = self.storage.node("MatMulInteger", [values, codes, zero], user)
        product = self.storage.node("Cast", [product], user, to=FLOAT)
        both = self.storage.node("Mul", [size, scale], user)
        return self.storage.node("Mul", [product, both], user)

    def _rounded_input(self, value: Any) -> tuple[Any, Any, Any]:
        """Codes, scale and zero point of an activation; layers that share their input share them."""
        if value not in self.rounded:
            made = onnx_ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], made)
            else:
                producer.graph.insert_after(producer, made)
            self.rounded[value] = tuple(made.outputs)
        return self.rounded[value]

    def _block_product(self, user: Any, weight: StoredWeight, *, turned: bool, looked_up: bool) -> Any:
        matrix = weight if turned else weight.transposed()  # [N, K]
        blocks = in_blocks(matrix)
        if blocks is None:
            return None
        rows, columns = matrix.shape
        inputs = [user.inputs[0], *self._blocks(matrix.name, blocks)]
        return self.storage.node(
            *("MatMulNBits", inputs, user),
            domain=MICROSOFT,
            **{"K": columns, "N": rows, "bits": blocks.bits, "block_size": blocks.block_size},
        )

    def _blocks(self, name: str, blocks: Blocks) -> list[Any]:
        values = [
            self.storage.constant(f"{name}.blocks", blocks.codes),
            self.storage.constant(f"{name}.scales", blocks.scale),
        ]
        if blocks.zero_point is not None:
            values.append(self.storage.constant(f"{name}.zeros", blocks.zero_point))
        return values

    # --- embeddings

    def _look_up(self, user: Any, weight: StoredWeight) -> bool:
        if self.dynamic:
            if weight.axes != [0] or not weight.symmetric:
                return False
            self.storage.replace(user, looked_up_rows(self.storage, user, weight))
            return True
        blocks = in_blocks(weight) if weight.codes.ndim == 2 else None
        if blocks is None or weight.shape[1] % (8 // blocks.bits):
            return False
        codes, *others = self._blocks(weight.name, blocks)
        rows, width = weight.shape[0], weight.shape[1] * blocks.bits // 8
        flat = self.storage.constant(f"{weight.name}.flat", np.array([rows, -1], np.int64))
        table = self.storage.node("Reshape", [codes, flat], user)
        if blocks.codes.shape[1] * blocks.codes.shape[2] != width:
            ends = [self.storage.constant(f"tersor.int64.{end}", np.array([end], np.int64)) for end in (0, width, 1)]
            table = self.storage.node("Slice", [table, ends[0], ends[1], ends[2]], user)
        output = self.storage.node(
            *("GatherBlockQuantized", [table, user.inputs[1], *others], user),
            domain=MICROSOFT,
            **{"bits": blocks.bits, "block_size": blocks.block_size, "gather_axis": 0, "quantize_axis": 1},
        )
        self.storage.replace(user, output)
        return True

    # --- recurrent layers

    def _lstm(self, user: Any) -> bool:
        """DynamicQuantizeLSTM takes both weights or none; `[D, K, 4 H]` each."""
        parts = [self.pending.get(user.inputs[index].name) for index in (1, 2)]
        if any(part is None or not _per_channel(part) for part in parts):
            return False
        weights, scales = [], []
        for part in parts:
            assert part is not None  # noqa: S101 - checked above
            codes = np.ascontiguousarray(part.codes.transpose(1, 2).numpy().astype(np.int8))
            weights.append(self.storage.constant(f"{part.name}.q", codes))
            scale = expanded(part.scale, (*part.shape[:2], 1))[..., 0]
            scales.append(self.storage.constant(f"{part.name}.scale", np.ascontiguousarray(scale.numpy())))
            scales.append(self.storage.constant(f"{part.name}.zero", np.zeros(scale.shape, np.int8)))
        inputs = list(user.inputs) + [None] * (8 - len(user.inputs))
        inputs = [inputs[0], *weights, *inputs[3:8], *scales]
        attributes = [value for name, value in user.attributes.items() if name != "layout"]
        made = onnx_ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(user.outputs))
        user.graph.insert_before(user, made)
        for old, new in zip(user.outputs, made.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name, old.name = old.name, None
        user.graph.remove(user, safe=True)
        return True

    def store(self, table: Table) -> frozenset[str]:
        """As in `Compressed`."""
        self.pending = {
            name: found.weight
            for name, value in self.graph.initializers.items()
            if value.const_value is not None
            and value.const_value.dtype == onnx_ir.DataType.FLOAT
            and (found := table.get(key_of(value.const_value.numpy()))) is not None
        }
        return super().store(table)


def looked_up_rows(storage: Storage, user: Any, weight: StoredWeight) -> Any:
    """`Gather` on the codes and on the scales of the rows, instead of decoding the whole table at every call."""
    indices = user.inputs[1]
    codes = storage.constant(f"{weight.name}.q", weight.codes.numpy().astype(np.int8))
    column = _column(weight.scale, weight.codes.ndim)
    scales = storage.constant(f"{weight.name}.rows", column)
    rows = storage.node("Cast", [storage.node("Gather", [codes, indices], user, axis=0)], user, to=FLOAT)
    return storage.node("Mul", [rows, storage.node("Gather", [scales, indices], user, axis=0)], user)


def _column(scale: Tensor, dimensions: int) -> Any:
    return np.ascontiguousarray(scale.reshape(-1, *[1] * (dimensions - 1)).numpy())


def _per_channel(weight: StoredWeight) -> bool:
    return weight.codes.ndim == 3 and weight.scale.shape[2] == 1 and weight.symmetric and weight.signed


def _turns(user: Any) -> bool:
    return "perm" not in user.attributes or list(user.attributes["perm"].as_ints()) == [1, 0]


def _axis(user: Any) -> int:
    return int(user.attributes["axis"].as_int()) if "axis" in user.attributes else 0


def check_all_found(found: frozenset[str], planned: set[str]) -> None:
    """Nothing that the plan names may silently stay float.

    Raises:
        ExportError: naming what is not in the file.
    """
    missing = sorted(planned - found)
    if missing:
        raise ExportError(
            f"{len(missing)} quantized weights are not in the exported graph, so they would have stayed float: "
            f"{missing[:5]}; the model changes them before it uses them, or does not use them. Leave them out: "
            f"keep={tuple(missing[:2])}"
        )
