"""Float initialisers in 16 bits, decoded by a cast that runtimes carry out once, when they load the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from tersor.runtimes.onnx_storage import FLOAT, Storage

SMALLEST = 16  # entries; what is smaller would grow by the cast's node
TYPES = {"float16": onnx_ir.DataType.FLOAT16, "bfloat16": onnx_ir.DataType.BFLOAT16}


def store_as_halves(graph: Any, kind: str) -> None:
    """Replaces every float32 initialiser by its nearest 16-bit floats and a cast back.

    Args:
        graph: Of an ONNX model; changed in place.
        kind: A key of `TYPES`.
    """
    storage, limit = Storage(graph), TYPES[kind]
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.size < SMALLEST or not value.uses():
            continue
        stored = storage.constant(f"{name}.{kind}", array.astype(limit.numpy()))
        decoded = storage.node("Cast", [stored], None, to=FLOAT)
        value.replace_all_uses_with(decoded)
        del graph.initializers[name]
        decoded.name = name
