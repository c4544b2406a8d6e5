"""Captures a module as one flat ATen graph, through `torch.export`."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.batch import Batch, Flattened
from tersor.errors import CaptureError, OutputError

_PREFIX = "module."


def capture(
    module: nn.Module,
    batch: Batch,
    *,
    names: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    output: str | int | None = None,
) -> fx.GraphModule:
    """Traces `module` in evaluation mode into a graph that takes its inputs by position and returns one tensor.

    Parameters keep their paths and are copies: the module is not touched. Each node's `meta["module"]` is the
    path of the module it came from.

    Args:
        module: Any module that `torch.export` can trace.
        batch: Example inputs; every dynamic dimension must be at least 2, else it would be baked in.
        names: The inputs' names, positional ones first.
        dynamic: Per input the dimensions that vary, with a label; equal labels mean equal sizes.
        output: Which output counts, if the module returns several.

    Raises:
        CaptureError: with the first line of `torch.export`'s own reason.
        OutputError: if the model returns several values and none was declared.
    """
    wrapped = Flattened(copy.deepcopy(module), tuple(batch.kwargs), output).eval()
    labels = {label for dims in dynamic.values() for label in dims.values()}
    dims = {label: torch.export.Dim(label) for label in sorted(labels)}
    shapes = tuple({axis: dims[label] for axis, label in dynamic[name].items()} for name in names)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. that an LSTM keeps a list of its weights, which does no harm
            program = torch.export.export(wrapped, input_tensors(batch), dynamic_shapes=(shapes,), strict=False)
    except OutputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CaptureError(
            f"torch.export could not trace {type(module).__name__}: {lines[0] if lines else type(error).__name__}; "
            "data-dependent control flow and sizes fixed in the code are the usual causes. The eager runtime "
            "needs no trace: Target('eager')"
        ) from error
    flat = _flatten(program.module(), names)
    del program, wrapped
    gc.collect()  # programs hold themselves in cycles, and with them parameters that are about to be replaced
    return flat


def _flatten(exported: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """A plain `GraphModule`: no guards, no pytrees, the wrapper's prefix gone, one output tensor."""
    source = exported.graph
    assert isinstance(source, fx.Graph)  # noqa: S101 - `ExportedProgram.module()` is a GraphModule
    graph = fx.Graph()
    placeholders = [node for node in source.nodes if node.op == "placeholder"]
    # Before all others, so that an operator of the same name gets another one.
    values = {node: graph.placeholder(name) for node, name in zip(placeholders, names, strict=True)}
    for node, copied in values.items():
        copied.meta = dict(node.meta)
    attributes: dict[str, Any] = {}
    for node in source.nodes:
        if node.op in ("placeholder", "call_module"):  # `_guards_fn`: shape checks with no users
            continue
        if node.op == "output":
            (result,) = node.args[0]
            graph.output(values[result])
            continue
        copied = graph.node_copy(node, lambda argument: values[argument])
        if node.op == "get_attr":
            path = str(node.target)
            copied.target = path.removeprefix(_PREFIX)
            attributes[str(copied.target)] = _attribute(exported, path)
        copied.meta["module"] = _module_path(node)
        values[node] = copied
    graph.eliminate_dead_code()
    result = fx.GraphModule(attributes, graph)
    result.recompile()
    return result.eval()


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    # Paths read `L['self'].module.layer1.0` or `module.layer1.0`, depending on the release.
    return str(path).split("self'].")[-1].removeprefix(_PREFIX).removeprefix("module")


def input_tensors(batch: Batch) -> tuple[Tensor, ...]:
    """The inputs in the captured graph's order."""
    return tuple(batch.tensors().values())
