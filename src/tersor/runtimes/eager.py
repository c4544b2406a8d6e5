"""PyTorch itself. Artifacts are safetensors; loading needs the user's class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import Candidate
from tersor.core.signature import Signature
from tersor.core.target import Target
from tersor.errors import ArtifactError, OutputDirectoryError, UnsupportedError
from tersor.runtimes import torch_storage
from tersor.runtimes.base import Array, Build, Runtime, Session

FILE = "model.safetensors"


class TorchSession(Session):
    """A module in evaluation mode with the caller's thread count."""

    def __init__(self, module: nn.Module, signature: Signature, target: Target) -> None:
        super().__init__(signature)
        self.module = module.eval()
        self.threads = target.threads

    def run(self, inputs: dict[str, Array]) -> Array:
        """Runs the module without gradients."""
        torch.set_num_threads(self.threads)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.inference_mode():
            output = self.module(**tensors) if self.signature.by_name else self.module(*tensors.values())
        result: Array = select_output(output, self.signature.select).numpy()
        return result


class Eager(Runtime):
    """Writes `model.safetensors`; tied weights are stored once, those in few bits are decoded when they are loaded."""

    name: ClassVar[str] = "eager"
    package: ClassVar[str] = "torch"
    formats: ClassVar[frozenset[str]] = frozenset(
        {"float32", "float16-weights", "bfloat16-weights", "int8-weights", "int4-weights"}
    )
    needs_code: ClassVar[bool] = True

    def export(
        self, candidate: Candidate, example: Batch, directory: Path, *, signature: Signature, target: Target
    ) -> list[Path]:
        """Writes the weights."""
        if candidate.precision not in self.formats:
            raise UnsupportedError(
                f"runtime {self.name!r} has no integer kernels for {candidate.precision} here; use onnxruntime or "
                "openvino"
            )
        path = directory / FILE
        try:
            if candidate.plan is None:
                save_model(candidate.module, str(path))
            else:
                torch_storage.write(candidate.module, candidate.plan, path)
        except SafetensorError as error:  # its own form of an OSError
            raise OutputDirectoryError(
                f"cannot write {path}: {error}; nothing was left behind. Free space or choose another directory"
            ) from error
        return [path]

    def load(
        self, directory: Path, *, signature: Signature, target: Target, model: Build | None = None
    ) -> TorchSession:
        """Builds the module with `model()` and fills in the weights."""
        if model is None:
            raise ArtifactError(
                f"a {self.name!r} artifact holds weights only; give the class: tersor.load(directory, model=build), "
                "where build() returns the untrained module"
            )
        module = model()
        try:
            stored = torch_storage.read(directory / FILE)
            if stored.precision != "float32":
                module = copy.deepcopy(module)  # what `model` gave may be in use, and this becomes another model
            floats = {name: torch_storage.decoded(weight) for name, weight in stored.weights.items()}
            torch_storage.fill(module, stored.tensors | floats)
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(
                f"the weights in {directory / FILE} do not fit the module that model() returned: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return TorchSession(self.prepare(module.eval(), stored), signature, target)

    def prepare(self, module: nn.Module, stored: torch_storage.Stored) -> nn.Module:
        """What is done to a module, filled with what was stored, before it runs."""
        return module
