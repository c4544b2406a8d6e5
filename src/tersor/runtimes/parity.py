"""Checks that an exported model answers like the PyTorch model it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate
from tersor.core.signature import Signature
from tersor.errors import CaptureError, ParityError
from tersor.graph import capture, first_divergence, fold_batch_norm, lower
from tersor.graph.divergence import relative_error
from tersor.runtimes.base import Array, Loaded
from tersor.runtimes.onnx_routes import dynamic_of

BATCHES = (1, 7)
# Relative L2 error of the output. Float kernels reorder sums; integer kernels may round a tie to the other code,
# and each such flip travels on through the layers after it.
TOLERANCE = {
    "float32": 1e-3,
    "int8": 0.1,
    "int4": 0.1,
    "int8-dynamic": 0.1,
    "int8-weights": 1e-3,  # the same float products, of weights that both sides have rounded
    "int4-weights": 1e-3,
    "float16-weights": 2e-3,  # what BatchNorm was folded into is rounded once more
    "bfloat16-weights": 2e-2,
}


def check_parity(loaded: Loaded, candidate: Candidate, example: Callable[[int], Batch]) -> float:
    """Compares at batch 1 and 7, and at other sizes of every declared dynamic dimension.

    Args:
        loaded: The exported model.
        candidate: What it was exported from; the quantized simulation where there is one.
        example: Gives real inputs of a wanted batch size.

    Returns:
        The largest relative error seen.

    Raises:
        ParityError: naming the sizes, the error, and the first layer that disagrees.
    """
    session, signature = loaded(), loaded.signature
    tolerance = TOLERANCE[candidate.precision]
    worst = 0.0
    for sizes, batch in _cases(example, signature):
        with torch.no_grad():
            if candidate.simulation is not None:
                expected = candidate.simulation(*batch.tensors().values())
            else:
                expected = select_output(batch.call(candidate.module), signature.select)
        error = relative_error(torch.as_tensor(batch.call(session)), expected)
        worst = max(worst, error)
        if not error <= tolerance:
            raise ParityError(
                f"the model exported for {loaded.runtime.name!r} differs from PyTorch at {sizes}: relative error "
                f"{error:.2g}, at most {tolerance:g} is acceptable; {_explain(loaded, candidate, batch, tolerance)}"
            )
    return worst


def _cases(example: Callable[[int], Batch], signature: Signature) -> Iterator[tuple[str, Batch]]:
    for size in BATCHES:
        yield f"batch {size}", example(size)
    labels = {label for dims in dynamic_of(signature).values() for label in dims.values()} - {"batch"}
    for label in sorted(labels):
        batch = example(2)
        tensors, length = {}, 0
        for (key, tensor), spec in zip(batch.tensors().items(), signature.inputs, strict=True):
            for axis, extent in enumerate(spec.shape):
                if extent == label:
                    length = (tensor.shape[axis] + 1) // 2
                    tensor = tensor.narrow(axis, 0, length)
            tensors[key] = tensor
        positional = tuple(tensors[str(index)] for index in range(len(batch.args)))
        yield f"{label} = {length}", Batch(positional, {key: tensors[key] for key in batch.kwargs}, None)


def _explain(loaded: Loaded, candidate: Candidate, batch: Batch, tolerance: float) -> str:
    signature, target = loaded.signature, loaded.target
    try:
        graph_module = _reference(candidate, batch, signature)
    except CaptureError:
        graph_module = None
    if graph_module is None:
        return "the layer is unknown: the model was traced, or rounds while it runs, so no inner values compare"
    inputs: list[Tensor] = list(batch.tensors().values())
    (last,) = graph_module.graph.output_node().all_input_nodes

    def values(names: Sequence[str]) -> dict[str, Array]:
        found = loaded.runtime.values(loaded.directory, names, batch, signature=signature, target=target)
        return {last.name if name == signature.output.name else name: value for name, value in found.items()}

    found = first_divergence(graph_module, inputs, values, tolerance)
    if found is None:
        return (
            "no layer differs when each is looked at alone, so a fused kernel does: int8 kernels overflow on "
            "processors without VNNI; Target(reduce_range=True) avoids that"
            if candidate.precision == "int8"
            else "the runtime shows no inner values, so the layer is unknown"
        )
    name, module, error = found
    return f"the first layer that disagrees is {module or '(model)'!r} (value {name!r}, relative error {error:.2g})"


def _reference(candidate: Candidate, batch: Batch, signature: Signature) -> fx.GraphModule | None:
    if candidate.simulation is not None:
        if not isinstance(candidate.simulation, fx.GraphModule):
            return None
        return lower(candidate.simulation).graph_module
    names = [spec.name for spec in signature.inputs]
    graph_module = capture(
        candidate.module, batch, names=names, dynamic={name: {} for name in names}, output=signature.select
    )
    fold_batch_norm(graph_module)  # as in the exported model, so that equal names mean equal values
    return graph_module
