"""The two ways from PyTorch to an ONNX graph: through `torch.export`, and by tracing for what that refuses.

With a dynamic length, a recurrent layer goes through `torch.export` only at the price of a length that is silently
fixed: such models are always traced.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import fx, nn

from tersor.core.batch import Batch, Flattened
from tersor.core.signature import Signature
from tersor.errors import ExportError, TersorError
from tersor.graph.operators import quantize_dequantize

OPSET = 20  # at 21 ONNX Runtime rewrites signed matrix products and fails
PACKED_OPSET = 21  # the first that knows four bits and groups
TRACED_OPSET = 17
_PREFIX = "module."


def dynamic_of(signature: Signature) -> dict[str, dict[int, str]]:
    """Per input the dimensions that vary, with their labels."""
    return {
        spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in signature.inputs
    }


def must_be_traced(module: nn.Module, signature: Signature, planned: set[str]) -> bool:
    """Whether `torch.export` would fix a length, or take recurrent weights that are to be quantized apart."""
    recurrent = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.RNNBase)]
    if any(axis != 0 for dims in dynamic_of(signature).values() for axis in dims):
        return bool(recurrent)
    return any(f"{path}.{name}".lstrip(".") in planned for path, layer in recurrent for name, _ in _own(layer))


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return layer.named_parameters(recurse=False, remove_duplicate=False)


def through_export(graph_module: fx.GraphModule, example: Batch, signature: Signature, opset: int) -> Any:
    """A captured graph as an ONNX model, not yet optimised: its parameters keep their names.

    Raises:
        ExportError: with the exporter's reason.
    """
    dynamic = dynamic_of(signature)
    dims = {label: torch.export.Dim(label) for shape in dynamic.values() for label in shape.values()}
    shapes = tuple({axis: dims[label] for axis, label in dynamic[spec.name].items()} for spec in signature.inputs)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph_module,
                tuple(example.tensors().values()),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[signature.output.name],
                opset_version=opset,
                external_data=False,
                custom_translation_table=_translations(),
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise refused(error) from error
    assert program is not None  # noqa: S101 - dynamo=True returns the program
    return program


def by_tracing(module: nn.Module, example: Batch, signature: Signature, opset: int) -> Any:
    """A module as the older exporter sees it, operator by operator as they run.

    Raises:
        ExportError: if it cannot take the model, or what the model does depends on the values.
    """
    wrapped = Flattened(copy.deepcopy(module), tuple(example.kwargs), signature.select).eval()
    dynamic: dict[str, dict[int, str]] = {**dynamic_of(signature), signature.output.name: {0: "batch"}}
    file: Any = io.BytesIO()  # the older exporter takes that too, whatever its signature says
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.onnx.export(
                wrapped,
                tuple(example.tensors().values()),
                file,
                dynamo=False,
                dynamic_axes=dynamic,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[signature.output.name],
                opset_version=min(opset, OPSET),
                external_data=False,
                training=torch.onnx.TrainingMode.PRESERVE,  # evaluation, but BatchNorm leaves the weights alone
            )
    except Exception as error:
        raise refused(error) from error
    _check_decisions(warned)
    model = onnx_ir.from_proto(_proto(file.getvalue()))
    if opset > OPSET:  # nothing that the exporter writes changed its meaning from 20 to 21
        model.graph.opset_imports[""] = opset
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)
    return model


def _check_decisions(warned: list[warnings.WarningMessage]) -> None:
    """A decision that the model takes by a value would be fixed for ever; PyTorch's own modules only check shapes."""
    for warning in warned:
        ours = Path(warning.filename).is_relative_to(Path(torch.__file__).parent)
        if warning.category.__name__ == "TracerWarning" and not ours:
            reason = str(warning.message).partition(". ")[0]
            raise ExportError(
                f"a decision of the model depends on its input and would be fixed ({Path(warning.filename).name}:"
                f"{warning.lineno}: {reason})"
            )


def refused(error: Exception) -> TersorError:
    """The exporter's reason in one line."""
    if isinstance(error, TersorError):
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ExportError(f"the ONNX exporter could not take the model: {lines[0]}")


def _proto(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content)


def _translations() -> dict[Any, Any]:
    """ONNX for the operator of `tersor.graph.operators`."""
    from onnxscript import opset20 as op

    def to_onnx(values: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(values, scale, zero_point), scale, zero_point)

    return {quantize_dequantize: to_onnx}


@contextmanager
def quiet() -> Iterator[None]:
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
