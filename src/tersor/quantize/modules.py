"""Weights that can be rounded without capturing a graph: found by the modules that own them.

Shapes: `O` outputs, `K` inputs of a weight seen as a matrix, `G` groups of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import check_finite_weights
from tersor.core.quantization import QuantScheme, TensorQuant
from tersor.errors import ConfigError, ModelError, UnsupportedError
from tersor.quantize.rounding.base import WeightGrid

Kind = Literal["linear", "recurrent", "embedding", "convolution"]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STRAIGHT = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class ModuleWeight:
    """A parameter that a module multiplies with, or looks rows up in.

    Attributes:
        path: Of the parameter.
        module_path: Of the module that owns it; of a tied one the layer that computes with it.
        name: Of the parameter in that module.
        module: The module.
        kind: What it does.
        output_axis: The dimension of the outputs: 0, or 1 for `[K, O]`.
    """

    path: str
    module_path: str
    name: str
    module: nn.Module
    kind: Kind
    output_axis: int = 0

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        found: Tensor = getattr(self.module, self.name)
        return found

    @property
    def input_axis(self) -> int:
        """The dimension of the inputs."""
        return 1 - self.output_axis

    def rows(self) -> Tensor:
        """The weight as `[O, K]`, a view where possible."""
        return self.weight.detach().movedim(self.output_axis, 0).flatten(1)

    def write(self, rows: Tensor) -> None:
        """Takes new values, `[O, K]`, in place."""
        moved = self.weight.detach().movedim(self.output_axis, 0)
        with torch.no_grad():
            moved.copy_(rows.reshape(moved.shape))

    def scheme(self, bits: int, *, symmetric: bool, group_size: int | None) -> QuantScheme:
        """One scale per output, or per group of inputs."""
        axis = self.output_axis if group_size is None else self.input_axis
        return QuantScheme(bits=bits, signed=symmetric, symmetric=symmetric, axis=axis, group_size=group_size)

    def entry(self, grid: WeightGrid, group_size: int | None) -> TensorQuant:
        """The line of the plan, scales in the order of `Granularity.rows`."""
        scheme = self.scheme(grid.scheme.bits, symmetric=grid.scheme.symmetric, group_size=group_size)
        scale, zero_point = (part if group_size is not None else part[:, :1] for part in (grid.scale, grid.zero_point))
        return TensorQuant(
            name=self.path,
            role="weight",
            scheme=scheme,
            scale=scale.flatten().tolist(),
            zero_point=zero_point.to(torch.int32).flatten().tolist(),
            module=self.module_path,
        )


def quantizable(model: nn.Module) -> list[ModuleWeight]:
    """Every weight of a linear, recurrent, embedding or convolution layer, tied ones once, in the order of modules.

    Of a tied weight the layer that multiplies with it counts. Left alone: weights that are computed
    (parametrizations), embeddings that renormalise themselves, recurrent layers with projections, sparse gradients no
    matter.
    """
    first = {id(parameter): path for path, parameter in model.named_parameters()}
    found: dict[int, ModuleWeight] = {}
    for module_path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, (kind, axis) in _weights_of(module).items():
            parameter = own.get(name)
            if parameter is None or id(parameter) not in first:
                continue
            known = found.get(id(parameter))
            if known is None or (known.kind == "embedding" and kind == "linear" and axis == 0):
                found[id(parameter)] = ModuleWeight(first[id(parameter)], module_path, name, module, kind, axis)
    return list(found.values())


def _weights_of(module: nn.Module) -> dict[str, tuple[Kind, int]]:
    if isinstance(module, nn.Linear):
        return {"weight": ("linear", 0)}
    if isinstance(module, nn.RNNBase):
        names = [
            name for name, _ in module.named_parameters(recurse=False) if name.startswith(("weight_ih", "weight_hh"))
        ]
        return {} if module.proj_size else {name: ("recurrent", 0) for name in names}
    if isinstance(module, nn.Embedding):
        return {"weight": ("embedding", 0)} if module.max_norm is None else {}
    if isinstance(module, _TRANSPOSED):
        return {"weight": ("convolution", 1)}
    if isinstance(module, _STRAIGHT):
        return {"weight": ("convolution", 0)}
    if isinstance(module, nn.MultiheadAttention):
        projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return {name: ("linear", 0) for name in projections}
    if type(module).__name__ == "Conv1D":  # of transformers: [K, O]
        return {"weight": ("linear", 1)}
    return {}


def select(
    model: nn.Module, step: str, *, example: Batch, output: str | int | None, keep: Sequence[str], kinds: Sequence[Kind]
) -> list[ModuleWeight]:
    """The weights of these kinds that the output depends on, without those that `keep` names.

    Args:
        model: In evaluation mode; stays as it is.
        step: For messages.
        example: What the model is run on to see what it uses.
        output: Which of its outputs counts.
        keep: Glob patterns over module and parameter paths that stay float.
        kinds: Which layers.

    Raises:
        UnsupportedError: if the model is not float32, or nothing is left to quantize.
        NonFiniteError: for NaN or Inf in a weight.
        ConfigError: if a pattern fits nothing.
    """
    types = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if types - {torch.float32}:
        raise UnsupportedError(
            f"{step} takes float32 models, {type(model).__name__} has {sorted(map(str, types))}; "
            "call model.float() first"
        )
    check_finite_weights(model)
    candidates = quantizable(model)
    for pattern in keep:
        if not any(_fits(pattern, weight) for weight in candidates):
            names = sorted({weight.module_path for weight in candidates})
            raise ConfigError(f"keep: {pattern!r} fits no layer; the layers that could be quantized are {names}")
    used = _used(model, example, output)
    chosen = [
        weight
        for weight in candidates
        if weight.kind in kinds
        and (used is None or weight.path in used)
        and not any(_fits(pattern, weight) for pattern in keep)
        and weight.weight.numel()
    ]
    if not chosen:
        raise UnsupportedError(
            f"{step} found no weight that it can quantize in {type(model).__name__}: it covers {', '.join(kinds)} "
            "layers that the output depends on, less those that `keep` names"
        )
    return chosen


def _fits(pattern: str, weight: ModuleWeight) -> bool:
    return fnmatchcase(weight.module_path, pattern) or fnmatchcase(weight.path, pattern)


def _used(model: nn.Module, example: Batch, output: str | int | None) -> set[str] | None:
    """Paths of the parameters that the output depends on, by autograd's own record; None if there is none."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            result = select_output(example.call(twin), output)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model does not run on the task's first examples: {str(error).splitlines()[0]}"
        ) from error
    if result.grad_fn is None:
        return None
    paths = {id(parameter): path for path, parameter in twin.named_parameters()}
    seen: set[Node] = set()
    waiting: list[Node | None] = [result.grad_fn]
    used = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in paths:
            used.add(paths[id(variable)])
        waiting.extend(following for following, _ in node.next_functions)
    return used


def summary(chosen: Sequence[ModuleWeight], entries: Mapping[str, TensorQuant], model: nn.Module) -> str:
    """How many weights have how many bits, and their share of all parameters."""
    counts: dict[tuple[Any, int], int] = {}
    for weight in chosen:
        key = weight.kind, entries[weight.path].scheme.bits
        counts[key] = counts.get(key, 0) + 1
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(weight.weight.numel() for weight in chosen) / max(1, total)
    told = ", ".join(f"{count} {kind} weights in int{bits}" for (kind, bits), count in counts.items())
    return f"{told}: {share:.0%} of the parameters"
