"""Writes a candidate as one ONNX file; quantized tensors become integer initialisers with Q/DQ around them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.files import disk_errors
from tersor.core.signature import Signature
from tersor.errors import ExportError
from tersor.graph import capture, fold_batch_norm, lower
from tersor.graph.lower import IntegerConstant, Lowered
from tersor.graph.operators import quantize_dequantize

OPSET = 20  # at 21 ONNX Runtime rewrites signed matrix products and fails
EXAMPLE_BATCH = 2


def dynamic_of(signature: Signature) -> dict[str, dict[int, str]]:
    """Per input the dimensions that vary, with their labels."""
    return {
        spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in signature.inputs
    }


def write_onnx(candidate: Candidate, example: Batch, path: Path, signature: Signature) -> None:
    """Exports to `path`.

    Raises:
        ExportError: with the exporter's reason.
    """
    dynamic = dynamic_of(signature)
    if candidate.simulation is not None:
        lowered = lower(candidate.simulation)
    else:
        names = [spec.name for spec in signature.inputs]
        graph_module = capture(candidate.module, example, names=names, dynamic=dynamic, output=signature.select)
        fold_batch_norm(graph_module)  # the exporter would do it too, but lose the layers' names
        lowered = Lowered(graph_module, {})
    dims = {label: torch.export.Dim(label) for shape in dynamic.values() for label in shape.values()}
    shapes = tuple({axis: dims[label] for axis, label in dynamic[spec.name].items()} for spec in signature.inputs)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                lowered.graph_module,
                tuple(example.tensors().values()),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[signature.output.name],
                opset_version=OPSET,
                external_data=False,
                custom_translation_table=_translations() if candidate.simulation is not None else None,
                optimize=False,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - dynamo=True returns the program
            for parameter, constant in lowered.constants.items():
                _store_as_integers(program.model.graph, parameter, constant)
            program.optimize()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"the ONNX exporter could not take the model: {lines[0]}") from error
    _strip(program.model)
    with disk_errors(path):
        program.save(str(path), external_data=False)


def intermediate_model(path: Path, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """The ONNX file with those of the named values that it has as further outputs."""
    import onnx

    model = onnx.load(str(path))
    produced = {output for node in model.graph.node for output in node.output}
    existing = {output.name for output in model.graph.output}
    chosen = [name for name in names if name in produced and name not in existing]
    for name in chosen:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), chosen


def _translations() -> dict[Any, Any]:
    """ONNX for the operator of `tersor.graph.operators`."""
    from onnxscript import opset20 as op

    def to_onnx(values: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(values, scale, zero_point), scale, zero_point)

    return {quantize_dequantize: to_onnx}


def _store_as_integers(graph: Any, path: str, constant: IntegerConstant) -> None:
    """Replaces the float initialiser `path` by integer codes and a dequantization.

    A transposition of a constant is carried out on the codes, so that the dequantization stands directly before
    the operator that computes with it, where runtimes look for it.
    """
    value = graph.initializers[path]
    turned: dict[tuple[int, ...], Any] = {}  # a weight that several layers share is stored once
    for user, _ in list(value.uses()):
        if user.op_type == "Transpose":
            order = tuple(user.attributes["perm"].as_ints())
            if order not in turned:
                codes, axis = constant.codes.permute(order).contiguous(), order.index(constant.axis)
                name = f"{path}.T{len(turned) or ''}"
                turned[order] = _dequantized(graph, name, IntegerConstant(codes, constant.scale, axis))
            user.outputs[0].replace_all_uses_with(turned[order])
            graph.remove(user, safe=True)
    del graph.initializers[path]
    value.name = f"{path}.float"  # the dequantized value takes the name over
    if value.uses():
        value.replace_all_uses_with(_dequantized(graph, path, constant))


def _dequantized(graph: Any, name: str, constant: IntegerConstant) -> Any:
    parts = {
        "q": constant.codes,
        "scale": constant.scale,
        "zero": torch.zeros(len(constant.scale), dtype=constant.codes.dtype),
    }
    inputs = []
    for suffix, tensor in parts.items():
        array = tensor.numpy()
        value = onnx_ir.val(f"{name}.{suffix}", const_value=onnx_ir.tensor(array, name=f"{name}.{suffix}"))
        graph.register_initializer(value)
        inputs.append(value)
    node = onnx_ir.node("DequantizeLinear", inputs, attributes={"axis": constant.axis})
    node.outputs[0].name = name
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _strip(model: Any) -> None:
    """Drops what only debugging needs: it is a quarter of a small quantized file."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for node in model.graph:
        node.name = None
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():  # those are part of the interface
                output.type = None
                output.shape = None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its notes on packages that nobody needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
