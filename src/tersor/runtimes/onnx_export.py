"""Writes a candidate as one ONNX file, its quantized tensors as integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.files import disk_errors
from tersor.core.quantization import QuantPlan
from tersor.core.signature import Signature
from tersor.errors import CaptureError, ExportError
from tersor.graph import capture, fold_batch_norm, lower
from tersor.graph.fold import get_tensor
from tersor.runtimes.onnx_constants import store_as_integers
from tersor.runtimes.onnx_halves import store_as_halves
from tersor.runtimes.onnx_kernels import MICROSOFT, Compressed, Kernels, check_all_found
from tersor.runtimes.onnx_routes import (
    OPSET,
    PACKED_OPSET,
    TRACED_OPSET,
    by_tracing,
    dynamic_of,
    must_be_traced,
    quiet,
    refused,
    through_export,
)
from tersor.runtimes.stored_weights import table_of

EXAMPLE_BATCH = 2
Reader = Literal["onnxruntime", "openvino"]


def write_onnx(
    candidate: Candidate, example: Batch, path: Path, signature: Signature, *, reader: Reader = "onnxruntime"
) -> None:
    """Exports to `path`.

    Static plans are lowered from the simulation. All others start from the module: its rounded weights are found
    in the exported graph by their content and become integers there.

    Args:
        candidate: What to write.
        example: Inputs, two or more examples.
        path: Where to.
        signature: Names and varying dimensions.
        reader: Whose kernels the file is for; OpenVINO reads no operators of ONNX Runtime's own.

    Raises:
        ExportError: with the exporter's reason.
    """
    plan = candidate.plan
    if plan is not None and plan.mode == "static":
        model = _static(candidate, plan, example, signature)
    else:
        model = _from_module(candidate.module, plan, example, signature, reader)
    _strip(model)
    with disk_errors(path):
        onnx_ir.save(model, str(path))


def _static(candidate: Candidate, plan: QuantPlan, example: Batch, signature: Signature) -> Any:
    assert candidate.simulation is not None  # noqa: S101 - static plans come with theirs
    lowered = lower(candidate.simulation)
    packed = {name for name, quant in plan.weights.items() if plan.pack and quant.scheme.bits <= 4}
    program = through_export(lowered.graph_module, example, signature, PACKED_OPSET if packed else OPSET)
    try:
        with quiet():
            for parameter, constant in lowered.constants.items():
                store_as_integers(program.model.graph, parameter, constant, pack=parameter in packed)
            program.optimize()
    except Exception as error:
        raise refused(error) from error
    return program.model


def _from_module(
    module: nn.Module, plan: QuantPlan | None, example: Batch, signature: Signature, reader: Reader
) -> Any:
    planned = set(plan.weights) if plan is not None else set()
    grouped = plan is not None and any(quant.scheme.group_size is not None for quant in plan.weights.values())
    blocked = grouped and reader == "openvino"
    opset = PACKED_OPSET if blocked or (plan is not None and plan.pack) else OPSET
    if must_be_traced(module, signature, planned):
        return _traced(module, plan, example, signature, opset, reader)
    try:
        return _captured(module, plan, example, signature, opset, reader)
    except (CaptureError, ExportError) as error:
        try:
            return _traced(module, plan, example, signature, opset, reader)
        except ExportError as second:
            raise ExportError(f"{error}. The tracing exporter failed too: {second}") from error


def _captured(
    module: nn.Module, plan: QuantPlan | None, example: Batch, signature: Signature, opset: int, reader: Reader
) -> Any:
    """By `torch.export`. BatchNorm is folded here: the exporter would do it too, but lose the layers' names.

    A factor per output channel leaves the codes as they are and goes into the scales.
    """
    names = [spec.name for spec in signature.inputs]
    graph_module = capture(module, example, names=names, dynamic=dynamic_of(signature), output=signature.select)
    folded = {
        path: (norm.factor, norm.axis, get_tensor(graph_module, path).detach())
        for path, norm in fold_batch_norm(graph_module).items()
    }
    program = through_export(graph_module, example, signature, opset)
    try:
        with quiet():
            program.optimize()
    except Exception as error:
        raise refused(error) from error
    _store(program.model, module, plan, folded, reader)
    return program.model


def _traced(
    module: nn.Module, plan: QuantPlan | None, example: Batch, signature: Signature, opset: int, reader: Reader
) -> Any:
    model = by_tracing(module, example, signature, opset if opset > OPSET else TRACED_OPSET)
    _store(model, module, plan, {}, reader)
    return model


def _store(
    model: Any, module: nn.Module, plan: QuantPlan | None, folded: Mapping[str, tuple[Tensor, int, Tensor]], reader: str
) -> None:
    if plan is None:
        return
    if plan.casts:
        store_as_halves(model.graph, plan.mode)
        return
    dynamic = plan.mode == "dynamic"
    storing = (
        Compressed(model.graph, pack=plan.pack)
        if reader == "openvino"
        else Kernels(model.graph, pack=plan.pack, dynamic=dynamic)
    )
    check_all_found(storing.store(table_of(module, plan, folded)), set(plan.weights))
    if any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports[MICROSOFT] = 1


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


def _strip(model: Any) -> None:
    """Drops what only debugging needs: it is a quarter of a small quantized file."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
        value.type = value.shape = None  # the tensors tell
    for node in model.graph:
        node.name = None
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():  # those are part of the interface
                output.type = None
                output.shape = None
