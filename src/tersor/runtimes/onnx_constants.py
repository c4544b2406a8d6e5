"""Integer constants of static plans: codes with a `DequantizeLinear` in front of what computes with them."""

from __future__ import annotations

from typing import Any

import onnx_ir
import torch

from tersor.graph.lower import IntegerConstant
from tersor.runtimes.onnx_kernels import looked_up_rows
from tersor.runtimes.onnx_storage import Storage
from tersor.runtimes.stored_weights import StoredWeight


def store_as_integers(graph: Any, path: str, constant: IntegerConstant, *, pack: bool = False) -> None:
    """Replaces the float initialiser `path` by integer codes and a dequantization.

    A transposition of a constant is carried out on the codes, so that the dequantization stands directly before
    the operator that computes with it, where runtimes look for it. A look-up decodes the rows that it takes.

    Args:
        graph: Not yet optimised: the parameter has its name.
        path: The parameter.
        constant: Its codes.
        pack: Two codes to a byte; they must fit into four bits.
    """
    value = graph.initializers[path]
    storage = Storage(graph)
    turned: dict[tuple[int, ...], Any] = {}  # a weight that several layers share is stored once
    for user, index in list(value.uses()):
        if user.op_type == "Transpose":
            order = tuple(user.attributes["perm"].as_ints())
            if order not in turned:
                codes, axis = constant.codes.permute(order).contiguous(), order.index(constant.axis)
                name = f"{path}.T{len(turned) or ''}"
                turned[order] = _dequantized(storage, name, IntegerConstant(codes, constant.scale, axis), pack=pack)
            user.outputs[0].replace_all_uses_with(turned[order])
            user.graph.remove(user, safe=True)
        elif user.op_type == "Gather" and index == 0 and constant.axis == 0 and not pack:
            storage.replace(user, looked_up_rows(storage, user, _stored(path, constant)))
    del graph.initializers[path]
    value.name = f"{path}.float"  # the dequantized value takes the name over
    if value.uses():
        value.replace_all_uses_with(_dequantized(storage, path, constant, pack=pack))


def _stored(path: str, constant: IntegerConstant) -> StoredWeight:
    scale = constant.scale.float().reshape(-1, *[1] * (constant.codes.ndim - 1))
    zero_point = torch.zeros_like(scale, dtype=torch.int16)
    codes = constant.codes.to(torch.int16)
    return StoredWeight(path, frozenset({path}), codes, scale, zero_point, 8, signed=True)


def _dequantized(storage: Storage, name: str, constant: IntegerConstant, *, pack: bool) -> Any:
    kind = onnx_ir.DataType.INT4.numpy() if pack else constant.codes.numpy().dtype
    parts = {
        "q": constant.codes,
        "scale": constant.scale,
        "zero": torch.zeros(len(constant.scale), dtype=constant.codes.dtype),
    }
    inputs = [
        storage.constant(f"{name}.{suffix}", tensor.numpy() if suffix == "scale" else tensor.numpy().astype(kind))
        for suffix, tensor in parts.items()
    ]
    output = storage.node("DequantizeLinear", inputs, None, axis=constant.axis)
    output.name = name
    return output
