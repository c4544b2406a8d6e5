"""The contract of a runtime: two methods, `export` and `load`, and what a loaded model is.

Shapes: `B` batch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.candidate import Candidate
from tersor.core.signature import Signature
from tersor.core.target import Target
from tersor.errors import RuntimeUnavailableError, UnsupportedError

Array = np.ndarray[Any, Any]
Build = Callable[[], nn.Module]


class Session(ABC):
    """A loaded model: a plain callable, NumPy arrays or torch tensors in, the same kind out."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on inputs in the signature's order or by name; returns its output `[B, …]`."""
        values = self.signature.arrange(args, kwargs)
        as_torch = any(isinstance(value, Tensor) for value in values.values())
        output = self.run({name: _to_array(value) for name, value in values.items()})
        return torch.from_numpy(output) if as_torch else output

    @abstractmethod
    def run(self, inputs: dict[str, Array]) -> Array:
        """Runs the model on named arrays."""


class Runtime(ABC):
    """One way to run a model.

    A subclass sets `name`, `package` (the module that must import), `extra` (what to install, empty for core
    dependencies), `formats` (precisions that it has kernels for) and `needs_code` (whether loading needs the
    user's class).
    """

    name: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str] = ""
    formats: ClassVar[frozenset[str]] = frozenset({"float32"})
    needs_code: ClassVar[bool] = False

    @abstractmethod
    def export(
        self, candidate: Candidate, example: Batch, directory: Path, *, signature: Signature, target: Target
    ) -> list[Path]:
        """Writes the candidate's model files into `directory`, its quantization plan lowered to real kernels."""

    @abstractmethod
    def load(self, directory: Path, *, signature: Signature, target: Target, model: Build | None = None) -> Session:
        """Loads what `export` wrote."""

    def values(
        self, directory: Path, names: Sequence[str], example: Batch, *, signature: Signature, target: Target
    ) -> dict[str, Array]:
        """Intermediate values by graph node name, as far as the runtime can show them, and the output by its own.

        Used to explain a mismatch.
        """
        return {}

    def float_operators(self, directory: Path, example: Batch, *, signature: Signature, target: Target) -> list[str]:
        """Operators that compute in float in a quantized model, as `name x count`, by the runtime's own word."""
        return []

    def check_available(self) -> None:
        """Raises `RuntimeUnavailableError` with the command that installs the runtime."""
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            what = f"'tersor[{self.extra}]'" if self.extra else self.package
            raise RuntimeUnavailableError(
                f"target runtime {self.name!r} needs the package {self.package!r}, which does not import here "
                f"({error}); run: pip install {what}"
            ) from error

    def check_supports(self, precision: str | None, step: str) -> None:
        """Raises `UnsupportedError` unless the runtime has kernels for this precision."""
        if precision is not None and precision not in self.formats:
            raise UnsupportedError(
                f"{step} produces {precision}, but runtime {self.name!r} runs only {sorted(self.formats)} here; "
                "choose the target onnxruntime or openvino for integers, or leave the step out"
            )


@dataclass(frozen=True)
class Loaded:
    """A picklable recipe for loading a model in another process."""

    runtime: Runtime
    directory: Path
    signature: Signature
    target: Target
    model: Build | None = None

    def __call__(self) -> Session:
        """Loads."""
        return self.runtime.load(self.directory, signature=self.signature, target=self.target, model=self.model)


def _to_array(value: Any) -> Array:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().numpy()
    return np.ascontiguousarray(value)
