"""What a deployed model takes and gives, as data: enough to feed it without the Python that made it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.core.config import Config
from tersor.core.target import Target
from tersor.errors import ConfigError


class TensorSpec(Config):
    """One input or output. A dimension is a size, or the label of one that varies."""

    name: str
    dtype: str
    shape: list[int | str]


class Signature(Config):
    """Inputs in calling order, the output, and whether the inputs are passed by name."""

    inputs: list[TensorSpec]
    output: TensorSpec
    by_name: bool = False
    select: str | int | None = Field(default=None, description="which output of the original model it is")

    def arrange(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The given inputs by name.

        Raises:
            ConfigError: if there are too many, some are missing or a name is unknown.
        """
        names = [spec.name for spec in self.inputs]
        values = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) > len(names) or set(values) != set(names) or len(args) + len(kwargs) != len(names):
            raise ConfigError(
                f"the model takes the inputs {names}, got {len(args)} positional and {sorted(kwargs)} by name"
            )
        return values


def input_names(module: nn.Module, batch: Batch) -> list[str]:
    """Names of the model's inputs: keywords as they are, positional ones from `forward`'s parameters."""
    try:
        declared = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        declared = []
    positional = [declared[index] if index < len(declared) else f"input_{index}" for index in range(len(batch.args))]
    return positional + list(batch.kwargs)


def dynamic_dimensions(names: list[str], target: Target) -> dict[str, dict[int, str]]:
    """For each input the dimensions that vary: always the batch, and what the target declares."""
    unknown = set(target.dynamic) - set(names)
    if unknown:
        raise ConfigError(f"Target.dynamic: the model's inputs are {names}, got {sorted(unknown)}")
    return {name: {0: "batch", **target.dynamic.get(name, {})} for name in names}


def signature_of(names: list[str], batch: Batch, output: Tensor, target: Target, select: str | int | None) -> Signature:
    """Describes a model by an example batch and its output on it."""
    dynamic = dynamic_dimensions(names, target)
    specs = [
        TensorSpec(
            name=name,
            dtype=_dtype(tensor),
            shape=[dynamic[name].get(axis, size) for axis, size in enumerate(tensor.shape)],
        )
        for name, tensor in zip(names, batch.tensors().values(), strict=True)
    ]
    shape: list[int | str] = ["batch", *output.shape[1:]]
    return Signature(
        inputs=specs,
        output=TensorSpec(name="output", dtype=_dtype(output), shape=shape),
        by_name=bool(batch.kwargs),
        select=select,
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a `TensorSpec` names."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"TensorSpec.dtype: expected a torch dtype, got {name!r}")
    return dtype


def random_batch(signature: Signature, size: int, length: int = 32) -> Batch:
    """Random inputs that fit a signature: batch `size`, every other varying dimension `length`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in signature.inputs:
        shape = [size if axis == 0 else length if isinstance(dim, str) else dim for axis, dim in enumerate(spec.shape)]
        dtype = torch_dtype(spec.dtype)
        if dtype.is_floating_point:
            tensors[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            tensors[spec.name] = torch.ones(shape, dtype=dtype)
    return Batch((), tensors, None) if signature.by_name else Batch(tuple(tensors.values()), {}, None)
