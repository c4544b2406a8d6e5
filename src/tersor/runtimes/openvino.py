"""OpenVINO on the CPU (extra `openvino`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.signature import Signature
from tersor.core.target import Target
from tersor.errors import ExportError, OutputDirectoryError
from tersor.runtimes.base import Array, Build, Runtime, Session
from tersor.runtimes.onnx_export import write_onnx

FILE = "model.xml"
# OpenVINO rounds activations in groups wherever it finds compressed weights, unless it is told not to. The option
# travels in the model's file. Groups of 128 took half the time of 32, the default (512 x 512, AVX-512 VNNI).
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
DYNAMIC_GROUP = "128"
_COUNTED = re.compile(r"[A-Z][A-Za-z]+_\d+")  # e.g. Reshape_3389; the exporter's own names begin in lower case
_COMPUTES = {
    *("Convolution", "MatMul", "FullyConnected", "RNNSeq", "RNNCell"),
    *("Add", "Eltwise", "Pooling", "Multiply", "Subgraph"),
}


class OpenVinoSession(Session):
    """A compiled model with the caller's thread count, tuned for latency."""

    def __init__(self, model: Any, signature: Signature, target: Target) -> None:
        import openvino

        super().__init__(signature)
        config = {
            "INFERENCE_NUM_THREADS": target.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            self.compiled = openvino.Core().compile_model(model, "CPU", config)
        except Exception as error:
            raise ExportError(f"OpenVINO could not compile the model: {str(error).splitlines()[0]}") from error
        self.request = self.compiled.create_infer_request()

    def run(self, inputs: dict[str, Array]) -> Array:
        """Runs the graph; the result is a copy that later runs leave alone."""
        results = self.request.infer(inputs, share_inputs=True)
        return np.array(results[0])


def _number_from_zero(model: Any) -> None:
    """Renames operations that OpenVINO named by a counter of this process, so that equal models are equal files."""
    for index, operation in enumerate(model.get_ordered_ops()):
        if _COUNTED.fullmatch(operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{index}")


class OpenVino(Runtime):
    """Exports `model.xml` and `model.bin`."""

    name: ClassVar[str] = "openvino"
    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    formats: ClassVar[frozenset[str]] = frozenset(
        {
            *("float32", "float16-weights"),
            *("int8", "int4", "int8-dynamic", "int8-weights", "int4-weights"),
        }
    )

    def export(
        self, candidate: Candidate, example: Batch, directory: Path, *, signature: Signature, target: Target
    ) -> list[Path]:
        """Writes the model by way of ONNX, in the precision of the plan: no FP16 that nobody asked for."""
        import openvino

        with TemporaryDirectory() as scratch:
            source = Path(scratch) / "model.onnx"
            write_onnx(candidate, example, source, signature, reader="openvino")
            try:
                model = openvino.convert_model(str(source))
                _number_from_zero(model)
                mode = candidate.plan.mode if candidate.plan is not None else None
                model.set_rt_info(DYNAMIC_GROUP if mode == "dynamic" else "0", ["runtime_options", GROUP_SIZE])
            except Exception as error:
                reason = " ".join(str(error).split())[:400]  # the first line alone is only a place in its source
                raise ExportError(f"OpenVINO could not convert the model: {reason}") from error
            try:
                openvino.save_model(model, str(directory / FILE), compress_to_fp16=mode == "float16")
            except Exception as error:  # a full disk reads "basic_ios::clear: iostream error"
                raise OutputDirectoryError(
                    f"OpenVINO cannot write {directory / FILE} ({str(error).splitlines()[0]}); is the disk full or "
                    "read-only? Free space or choose another directory"
                ) from error
        return [directory / FILE, directory / "model.bin"]

    def load(
        self, directory: Path, *, signature: Signature, target: Target, model: Build | None = None
    ) -> OpenVinoSession:
        """Compiles `model.xml`."""
        return OpenVinoSession(str(directory / FILE), signature, target)

    def values(
        self, directory: Path, names: Sequence[str], example: Batch, *, signature: Signature, target: Target
    ) -> dict[str, Array]:
        """Runs the graph with its inner values as further outputs."""
        import openvino

        model = openvino.Core().read_model(str(directory / FILE))
        found = {operation.get_friendly_name(): operation for operation in model.get_ops()}
        chosen = [name for name in names if name in found]
        model.add_outputs([found[name].output(0) for name in chosen])
        session = OpenVinoSession(model, signature, target)
        inputs = dict(zip((spec.name for spec in signature.inputs), example.tensors().values(), strict=True))
        results = session.request.infer({name: value.numpy() for name, value in inputs.items()})
        return {name: np.array(results[index]) for index, name in enumerate([signature.output.name, *chosen])}

    def float_operators(self, directory: Path, example: Batch, *, signature: Signature, target: Target) -> list[str]:
        """Reads the precision of every operator in the compiled graph."""
        session = self.load(directory, signature=signature, target=target)
        counts: Counter[str] = Counter()
        rounds = int(session.compiled.get_property(GROUP_SIZE)) > 0
        for operation in session.compiled.get_runtime_model().get_ops():
            info = operation.get_rt_info()
            kind, precision = str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))
            kernel = str(info["primitiveType"].astype(str))
            decoding = kind == "FullyConnected" and kernel.endswith("_f32") and not rounds
            if kind in _COMPUTES and (decoding or precision in {"f32", "f16", "bf16"}):
                counts[kind] += 1
        return [f"{kind} x {count}" for kind, count in sorted(counts.items())]
