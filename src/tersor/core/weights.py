"""Weights: read from disk without executing anything that the file says, and hashed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tersor.errors import ArtifactError, ModelError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, or from a PyTorch file that holds nothing but tensors.

    Raises:
        ArtifactError: if the file is missing, damaged, or wants to run code.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"weights file {file} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch has to say about a damaged file, the error says too
            if file.suffix == ".safetensors":
                return load_file(str(file))
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly everything: struct.error, IndexError, AssertionError …
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(
            f"{file} is damaged or holds more than weights ({reason}); it was not loaded. "
            "Save weights with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise ArtifactError(f"{file} must hold a state dict (names to tensors), got {type(loaded).__name__}")
    return loaded


def fill(module: nn.Module, path: str | Path) -> nn.Module:
    """Loads the weights at `path` into `module`, in place, and returns it in evaluation mode.

    Raises:
        ModelError: naming the parameters that are missing, unexpected or of another shape.
    """
    try:
        module.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {path} do not fit {type(module).__name__}: {' '.join(str(error).split())}"
        ) from (None)
    return module.eval()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors: names, types, shapes and every bit; of what is spread over processes, this one's part."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
