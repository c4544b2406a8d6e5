"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.signature import Signature
from tersor.core.target import Target
from tersor.errors import ExportError
from tersor.runtimes.base import Array, Build, Runtime, Session
from tersor.runtimes.onnx_export import intermediate_model, write_onnx

FILE = "model.onnx"
# Operators that move or convert values; everything else in an int8 model's profile computes.
_MOVES = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Reshape",
    "Transpose",
    "Flatten",
    "Slice",
    "Pad",
    "Concat",
    "Squeeze",
    "Unsqueeze",
    "Gather",
    "Shape",
    "Cast",
    "Identity",
    "MaxPool",
    "ReorderInput",
    "ReorderOutput",
}


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` with the caller's thread count."""

    def __init__(self, source: str | bytes, signature: Signature, target: Target, profile: Path | None = None) -> None:
        import onnxruntime

        super().__init__(signature)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"ONNX Runtime could not load the model: {str(error).splitlines()[0]}") from error

    def run(self, inputs: dict[str, Array]) -> Array:
        """Runs the graph."""
        output: Array = self.session.run(None, inputs)[0]
        return output


class OnnxRuntime(Runtime):
    """Exports one `model.onnx`."""

    name: ClassVar[str] = "onnxruntime"
    package: ClassVar[str] = "onnxruntime"
    formats: ClassVar[frozenset[str]] = frozenset(
        {
            *("float32", "float16-weights", "bfloat16-weights"),
            *("int8", "int4", "int8-dynamic", "int8-weights", "int4-weights"),
        }
    )

    def export(
        self, candidate: Candidate, example: Batch, directory: Path, *, signature: Signature, target: Target
    ) -> list[Path]:
        """Writes `model.onnx`, weights inside."""
        path = directory / FILE
        write_onnx(candidate, example, path, signature)
        return [path]

    def load(
        self, directory: Path, *, signature: Signature, target: Target, model: Build | None = None
    ) -> OnnxRuntimeSession:
        """Opens `model.onnx`."""
        return OnnxRuntimeSession(str(directory / FILE), signature, target)

    def values(
        self, directory: Path, names: Sequence[str], example: Batch, *, signature: Signature, target: Target
    ) -> dict[str, Array]:
        """Runs the graph with its inner values as further outputs."""
        source, chosen = intermediate_model(directory / FILE, names)
        session = OnnxRuntimeSession(source, signature, target)
        inputs = {name: value.numpy() for name, value in _named(example, signature).items()}
        shown = [*chosen, signature.output.name]
        return dict(zip(shown, session.session.run(shown, inputs), strict=True))

    def float_operators(self, directory: Path, example: Batch, *, signature: Signature, target: Target) -> list[str]:
        """Reads the runtime's own profile of one run."""
        with TemporaryDirectory() as scratch:
            session = OnnxRuntimeSession(str(directory / FILE), signature, target, profile=Path(scratch) / "profile")
            session.run({name: value.numpy() for name, value in _named(example, signature).items()})
            events: list[dict[str, Any]] = json.loads(Path(session.session.end_profiling()).read_text())
        counts: Counter[str] = Counter()
        for event in events:
            args = event.get("args", {})
            operator = args.get("op_name")
            if operator is None or "output_type_shape" not in args or operator in _MOVES:
                continue
            if _computes_in_float(operator, args):
                counts[operator] += 1
        return [f"{operator} x {count}" for operator, count in sorted(counts.items())]


def _computes_in_float(operator: str, args: dict[str, Any]) -> bool:
    inputs = [kind for entry in args.get("input_type_shape", []) for kind in entry]
    return bool(inputs) and inputs[0] == "float" and not operator.startswith(("QLinear", "DynamicQuantize"))


def _named(example: Batch, signature: Signature) -> dict[str, Any]:
    return dict(zip((spec.name for spec in signature.inputs), example.tensors().values(), strict=True))
