"""Proposes which layers of a student learn from which layers of a teacher, from one forward pass of both.

Transformers: blocks at the same fraction of the depth, as in TinyBERT (Jiao et al. 2019,
https://arxiv.org/abs/1909.10351). Convolutional networks: the last output at each resolution, as in attention
transfer (Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1612.03928).

Shapes: `B` batch, `C` channels, `T` tokens, `D` width.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch, as_batch
from tersor.errors import ConfigError
from tersor.graph.coupling.couple import run_model
from tersor.probe.outputs import module_paths, refuse_nested

CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,  # and InstanceNorm
    nn.GroupNorm,
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
FUSED = frozenset({"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "to_qkv", "in_proj"})
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
OWN_PAIRS = (
    "name the pairs yourself: for each the address of a module in the student and of one in the teacher, with features "
    "[B, C, H, W], [B, C, L], [B, T, D] or [B, D], batch first"
)


@dataclass(frozen=True)
class Pair:
    """Addresses of `tersor.probe.outputs.Outputs` in student and teacher, and the shapes that one batch had there."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.student} {_shape(self.student_shape)} <- {self.teacher} {_shape(self.teacher_shape)}"


class Attention(NamedTuple):
    """Addresses of one block's projections, each with outputs `[B, T, D]`."""

    query: str
    key: str
    value: str


def propose(student: nn.Module, teacher: nn.Module, batch: Any, *, count: int | None = None) -> tuple[Pair, ...]:
    """Pairs of layers for feature losses, from the first to the last.

    - Repeated blocks (a list of modules of one class that return `[B, T, D]`): block ``i`` of ``n`` in the student
      learns from block ``round((i + 1) m / n) - 1`` of ``m`` in the teacher.
    - Feature maps: the last output at each resolution, preferably a whole stage's, learns from the teacher's at the
      same resolution; if they have no resolution in common, at the same fraction of the depth.
    - Recurrent layers: as blocks.

    Args:
        student: Runs once in evaluation mode; it stays as it is.
        teacher: The same.
        batch: A `Batch`, or what can be read as one.
        count: How many of the pairs, spread evenly and ending with the last; all by default.

    Raises:
        ConfigError: if the models are not of one of these kinds, or of different ones, or have fewer pairs.
        ModelError: if a model does not run on the batch.
    """
    kinds = [_layers(model, batch, who) for model, who in ((student, "student"), (teacher, "teacher"))]
    (kind, layers), (teacher_kind, teacher_layers) = kinds
    if kind != teacher_kind or len(layers) != len(teacher_layers):
        raise ConfigError(
            f"cannot pair {_told(layers)} of the student ({kind}) with {_told(teacher_layers)} of the teacher "
            f"({teacher_kind}); {OWN_PAIRS}"
        )
    pairs = [
        Pair(low.address, high.address, low.shape, high.shape)
        for row, teacher_row in zip(layers, teacher_layers, strict=True)
        for low, high in _matched(row, teacher_row, by_resolution=kind == "feature maps")
    ]
    if count is None:
        return tuple(pairs)
    if not 1 <= count <= len(pairs):
        raise ConfigError(f"expected a count from 1 to {len(pairs)}, the number of pairs, got {count}")
    return tuple(pairs[_same_depth(index, count, len(pairs))] for index in range(count))


def propose_attention(student: nn.Module, teacher: nn.Module) -> tuple[Attention, Attention]:
    """The query, key and value projections of the last self-attention of both models, found by their usual names.

    They are what MiniLMv2 compares (Wang et al. 2020, https://arxiv.org/abs/2012.15828).

    Raises:
        ConfigError: if a model has none, or computes the three in one matrix, a third of which has no address.
    """
    return _attention(student, "student"), _attention(teacher, "teacher")


class _Layer(NamedTuple):
    """What a module returned, or the first part of it."""

    path: str
    address: str
    shape: tuple[int, ...]
    module: nn.Module
    channels_first: bool  # told by the last weights before it


_Rows = list[list[_Layer]]


def _layers(model: nn.Module, batch: Any, who: str) -> tuple[str, _Rows]:
    given = as_batch(batch)
    seen = {path: layer for path, layer in _survey(model, given).items() if layer.shape[0] == len(given)}
    finders: dict[str, Callable[[Mapping[str, _Layer], nn.Module], _Rows]] = {
        "blocks": _blocks,
        "feature maps": _stages,
        "recurrent layers": _recurrent,
    }
    for kind, find in finders.items():
        if rows := find(seen, model):
            return kind, rows
    some = ", ".join(f"{layer.address!r} {_shape(layer.shape)}" for layer in list(seen.values())[-6:])
    raise ConfigError(
        f"the {who}, a {type(model).__name__}, has neither repeated blocks with [B, T, D], nor feature maps, nor "
        f"recurrent layers with the batch first; {OWN_PAIRS}; among others there are {some}"
    )


class _Survey:
    """The hook that notes what every module returns, in the order in which they finish."""

    def __init__(self) -> None:
        self.layers: dict[str, _Layer] = {}
        self.channels_first = False

    def hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            if _has_weights(module):
                self.channels_first = isinstance(module, CHANNELS_FIRST)
            key, value = _first(output)
            self.layers.pop(path, None)
            if isinstance(value, Tensor) and value.ndim:
                refuse_nested(value, path)
                address, shape = f"{path}{key}", tuple(value.shape)
                self.layers[path] = _Layer(path, address, shape, module, self.channels_first)

        return note


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _first(output: Any) -> tuple[str, Any]:
    if isinstance(output, Mapping) and output:
        key = next(iter(output))
        return f"[{key}]", output[key]
    return ("[0]", output[0]) if isinstance(output, list | tuple) and output else ("", output)


def _survey(model: nn.Module, batch: Batch) -> Mapping[str, _Layer]:
    survey = _Survey()
    modules = {module: path for path, module in reversed(list(module_paths(model).items()))}  # first names win
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(survey.hook(path)) for module, path in modules.items()]
    # A compiled model does not see new hooks; where nothing was compiled, the compiler need not be imported.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        model.eval()
        with torch.no_grad(), eager:
            run_model(model, batch.args, batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return survey.layers


def _blocks(seen: Mapping[str, _Layer], model: nn.Module) -> _Rows:
    """Outermost lists of modules of one class, with parts of their own and answers `[B, T, D]` of one shape."""
    rows: dict[str, list[_Layer]] = {}
    for path, module in module_paths(model).items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(f"{row}.") for row in rows):
            continue
        row = [seen.get(f"{path}.{name}".lstrip(".")) for name in module._modules]
        blocks = [layer for layer in row if layer is not None]
        kinds = {(type(layer.module), layer.shape) for layer in blocks if _is_block(layer)}
        if len(blocks) == len(row) and len(kinds) == 1 and all(map(_is_block, blocks)):
            rows[path] = blocks
    return list(rows.values())


def _is_block(layer: _Layer) -> bool:
    return len(layer.shape) == 3 and not layer.channels_first and next(layer.module.children(), None) is not None


def _stages(seen: Mapping[str, _Layer], model: nn.Module) -> _Rows:
    """One row: of each resolution that has weights the last map, under the name of the outermost stage.

    What lies inside a block (a class with parts that the model uses several times) does not count: the first layer of
    the block that halves the resolution still has the old one. Nor does what holds several resolutions.
    """
    maps = {path: layer for path, layer in seen.items() if path and _is_map(layer)}
    paths = module_paths(model)
    uses = Counter(type(module) for module in paths.values() if type(module) not in CONTAINERS)
    blocks = {path for path, module in paths.items() if uses[type(module)] > 1 and module._modules}
    last: dict[tuple[int, ...], _Layer] = {}
    for path, layer in maps.items():
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if not inside and (path in blocks or len(_resolutions(path, paths[path], maps)) < 2):
            last[layer.shape[2:]] = layer
    weighted = {layer.shape[2:] for layer in maps.values() if _has_weights(layer.module)}
    row = [layer for resolution, layer in last.items() if resolution in weighted]
    return [row] if row else []


def _resolutions(path: str, module: nn.Module, maps: Mapping[str, _Layer]) -> set[tuple[int, ...]]:
    """Of the module's parts; a list that is never called stands for its own parts."""
    found: set[tuple[int, ...]] = set()
    for name, part in module._modules.items():
        below = f"{path}.{name}"
        if below in maps:
            found.add(maps[below].shape[2:])
        elif isinstance(part, nn.ModuleList | nn.ModuleDict):
            found |= _resolutions(below, part, maps)
    return found


def _is_map(layer: _Layer) -> bool:
    rank = len(layer.shape)
    return (rank > 3 or (rank == 3 and layer.channels_first)) and max(layer.shape[2:]) > 1


def _recurrent(seen: Mapping[str, _Layer], model: nn.Module) -> _Rows:
    row = [layer for layer in seen.values() if isinstance(layer.module, nn.RNNBase) and len(layer.shape) == 3]
    return [row] if row else []


def _matched(
    row: Sequence[_Layer], teacher_row: Sequence[_Layer], *, by_resolution: bool
) -> list[tuple[_Layer, _Layer]]:
    if by_resolution:
        of_teacher = {layer.shape[2:]: layer for layer in teacher_row}
        common = [(layer, of_teacher[layer.shape[2:]]) for layer in row if layer.shape[2:] in of_teacher]
        if common:
            return common
    return [(layer, teacher_row[_same_depth(index, len(row), len(teacher_row))]) for index, layer in enumerate(row)]


def _same_depth(index: int, count: int, other: int) -> int:
    """The place among `other` whose end is nearest to the end of place `index` among `count`; halves go up."""
    return max((2 * (index + 1) * other + count) // (2 * count) - 1, 0)


def _attention(model: nn.Module, who: str) -> Attention:
    last, fused = None, ""
    for path, module in module_paths(model).items():
        if CROSS.search(path):
            continue
        names = module._modules
        for triple in PROJECTIONS:
            if all(name in names for name in triple):
                last = Attention(*(f"{path}.{name}".lstrip(".") for name in triple))
        one = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else next(iter(FUSED & set(names)), "")
        fused = f"{path}.{one}".lstrip(".") if one else fused
    if last is not None:
        return last
    if fused:
        raise ConfigError(
            f"the {who} computes queries, keys and values in one matrix, {fused!r}; an address names what a module "
            "returns, not a third of it: split the matrix into three linear layers, or choose another loss"
        )
    wanted = ", ".join("/".join(triple) for triple in PROJECTIONS)
    raise ConfigError(
        f"the {who}, a {type(model).__name__}, has no module with parts {wanted}; name the addresses of queries, keys "
        "and values yourself"
    )


def _told(rows: _Rows) -> str:
    return " and ".join(f"{len(row)} ({row[0].address!r} to {row[-1].address!r})" for row in rows)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(['B', *map(str, shape[1:])])}]"
