"""Surgery: cuts parameters and buffers, follows with the attributes; plans it as data, applies it, replays it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.surgery import Change, Cut, Surgery
from tersor.errors import SurgeryError
from tersor.graph.attention import attention_paths, free_attention
from tersor.graph.blocks import check_blocks, shrink_list, skip_block
from tersor.graph.coupling.couple import Coupling, named_tensors
from tersor.graph.coupling.family import Place
from tersor.graph.coupling.integers import Attribute, owners, read_integer, write_integer


def plan_surgery(model: nn.Module, coupling: Coupling, removed: Mapping[str, Tensor]) -> Surgery:
    """The surgery that removes units.

    Args:
        model: The model of the coupling; it stays as it is.
        coupling: From `couple`.
        removed: Family name -> numbers of the units to remove; never all of a family.

    Raises:
        SurgeryError: if a family would be empty.
    """
    tensors = named_tensors(model)
    gone: dict[Place, list[Tensor]] = defaultdict(list)
    classes: list[int] = []
    for name, units in removed.items():
        family = coupling[name]
        if len(units) >= family.size:
            raise SurgeryError(f"family {name!r} has {family.size} units, at least one must stay")
        if len(units):
            classes += coupling.classes_of(family, units)
            for place, rows in family.members.items():
                gone[place].append(rows[units].flatten())
    cuts = []
    for place, parts in gone.items():
        keep = torch.ones(tensors[place.parameter].shape[place.dim], dtype=torch.bool)
        keep[torch.cat(parts)] = False
        if not bool(keep.any()):
            raise SurgeryError(f"nothing of {place} would stay")
        kept = tuple(keep.nonzero().flatten().tolist())
        cuts.append(Cut(parameter=place.parameter, dim=place.dim, size=len(keep), kept=kept))
    order = {name: position for position, name in enumerate(tensors)}
    cuts.sort(key=lambda cut: (order[cut.parameter], cut.dim))
    changes = attribute_changes(model, cuts, coupling.attributes_without(classes))
    touched = {cut.parameter.rpartition(".")[0] for cut in cuts}
    freed = tuple(
        path
        for path in attention_paths(model)
        if any(parameter == path or parameter.startswith(f"{path}.") for parameter in touched)
    )
    return Surgery(freed=freed, cuts=tuple(cuts), changes=changes)


def attribute_changes(
    model: nn.Module, cuts: Iterable[Cut], values: Mapping[Attribute, int] = MappingProxyType({})
) -> tuple[Change, ...]:
    """What attributes become: those of `values`, and those that describe the layers that are cut."""
    holders = dict(owners(model))
    changes = []
    for attribute, value in {**values, **_described(model, cuts)}.items():
        before = int(read_integer(holders[attribute.owner], attribute))
        if before != value:
            changes.append(
                Change(
                    owner=attribute.owner, name=attribute.name, position=attribute.position, before=before, after=value
                )
            )
    return tuple(changes)


def apply_surgery(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Applies a surgery to `model` in place and returns it. Optimizers that hold its parameters must be rebuilt.

    Parameters that are one object under several names stay one. Nothing is changed if anything does not fit.

    Raises:
        SurgeryError: if a parameter, a size or an attribute is not what the surgery expects.
    """
    _check(model, surgery)
    for block in surgery.skipped:
        skip_block(model, block)
    for shrink in surgery.shrunk:
        shrink_list(model, shrink)
    for path in surgery.freed:
        free_attention(model, path)
    by_parameter: dict[str, list[Cut]] = defaultdict(list)
    for cut in surgery.cuts:
        by_parameter[cut.parameter].append(cut)
    tensors = named_tensors(model)
    replaced: dict[int, Tensor] = {}
    for name, cuts in by_parameter.items():
        replaced[id(tensors[name])] = _sliced(tensors[name], cuts)
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is not None and id(old) in replaced:
                setattr(module, name, replaced[id(old)])
    holders = dict(owners(model))
    for change in surgery.changes:
        write_integer(holders[change.owner], Attribute(change.owner, change.name, change.position), change.after)
    return model


def replay(model: nn.Module, surgeries: Iterable[Surgery]) -> nn.Module:
    """Applies surgeries to `model`, in place and in order; raises `SurgeryError` where one does not fit."""
    for surgery in surgeries:
        model = apply_surgery(model, surgery)
    return model


def _sliced(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    with torch.no_grad():
        result = tensor.detach()
        for cut in cuts:
            result = result.index_select(cut.dim, torch.tensor(cut.kept, device=tensor.device))
    result = result.contiguous(memory_format=_layout(tensor))
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def _layout(tensor: Tensor) -> torch.memory_format:
    """The order in memory, which decides how fast convolutions are."""
    for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _check(model: nn.Module, surgery: Surgery) -> None:
    tensors, holders, modules = named_tensors(model), dict(owners(model)), dict(model.named_modules())
    replaced = [*(block.path for block in surgery.skipped), *(shrink.path for shrink in surgery.shrunk)]
    for path in (*surgery.freed, *replaced):
        if path not in modules:
            raise SurgeryError(f"the surgery expects a module {path!r}, the model has none")
    check_blocks(modules, surgery)
    for path in surgery.freed:
        if not isinstance(modules[path], nn.MultiheadAttention):
            raise SurgeryError(f"{path!r} must be nn.MultiheadAttention, it is {type(modules[path]).__name__}")
    for cut in surgery.cuts:
        if cut.parameter not in tensors:
            raise SurgeryError(f"the surgery cuts {cut.parameter!r}, the model has no such parameter")
        shape = tuple(tensors[cut.parameter].shape)
        if cut.dim >= len(shape) or shape[cut.dim] != cut.size:
            raise SurgeryError(
                f"dimension {cut.dim} of {cut.parameter!r} must have size {cut.size}, its shape is {shape}; "
                "a surgery fits only the model that it was made for, as it was before"
            )
        if not cut.kept or sorted(set(cut.kept)) != list(cut.kept) or cut.kept[0] < 0 or cut.kept[-1] >= cut.size:
            raise SurgeryError(f"what is kept of {cut.parameter!r} must be ascending indices below {cut.size}")
    for change in surgery.changes:
        attribute = Attribute(change.owner, change.name, change.position)
        try:
            value = read_integer(holders[change.owner], attribute)
        except (KeyError, IndexError, TypeError):
            raise SurgeryError(f"the surgery changes {attribute}, the model has no such attribute") from None
        if value != change.before:
            raise SurgeryError(f"attribute {attribute} must be {change.before}, it is {value}")


# Attributes that only describe a layer's shape: what the layer does is in its weights. (attribute, parameter, dim)
_DESCRIBED: dict[str, tuple[tuple[str, str, int], ...]] = {
    "Linear": (("in_features", "weight", 1), ("out_features", "weight", 0)),
    "Bilinear": (("in1_features", "weight", 1), ("in2_features", "weight", 2), ("out_features", "weight", 0)),
    "Embedding": (("embedding_dim", "weight", 1), ("num_embeddings", "weight", 0)),
    "_BatchNorm": (("num_features", "weight", 0), ("num_features", "running_mean", 0)),
    "_InstanceNorm": (("num_features", "weight", 0),),
    "GroupNorm": (("num_channels", "weight", 0),),
    "PReLU": (("num_parameters", "weight", 0),),
    "Conv1D": (("nx", "weight", 0), ("nf", "weight", 1)),
    "RNNBase": (
        ("input_size", "weight_ih_l0", 1),
        ("hidden_size", "weight_hh_l0", 1),
        ("proj_size", "weight_hr_l0", 0),
    ),
    "RNNCellBase": (("input_size", "weight_ih", 1), ("hidden_size", "weight_hh", 1)),
    "MultiheadAttention": (("embed_dim", "in_proj_weight", 1),),
}


def _described(model: nn.Module, cuts: Iterable[Cut]) -> dict[Attribute, int]:
    """New values of attributes that describe a layer's own parameters."""
    sizes = {(cut.parameter, cut.dim): len(cut.kept) for cut in cuts}
    values: dict[Attribute, int] = {}
    for path, module in model.named_modules():
        names = {base.__name__ for base in type(module).__mro__}
        for layer in names & set(_DESCRIBED):
            for attribute, parameter, dim in _DESCRIBED[layer]:
                size = sizes.get((f"{path}.{parameter}".lstrip("."), dim))
                if size is not None and isinstance(getattr(module, attribute, None), int):
                    values[Attribute(path, attribute)] = size
        if isinstance(module, nn.RNNBase) and module.proj_size:  # then the states that come back are projections
            hidden = sizes.get((f"{path}.weight_hr_l0".lstrip("."), 1), module.hidden_size)
            values[Attribute(path, "hidden_size")] = hidden
        if isinstance(module, nn.modules.conv._ConvNd):
            values.update(_convolution(path, module, sizes))
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            size = sizes.get((f"{path}.weight".lstrip("."), 0))
            if size is not None and len(module.normalized_shape) == 1:
                values[Attribute(path, "normalized_shape", 0)] = size
    return values


def _convolution(path: str, module: nn.modules.conv._ConvNd, sizes: Mapping[tuple[str, int], int]) -> Any:
    name = f"{path}.weight".lstrip(".")
    rows, columns = sizes.get((name, 0)), sizes.get((name, 1))
    result: dict[Attribute, int] = {}
    if not module.transposed:
        if rows is not None:
            result[Attribute(path, "out_channels")] = rows
        if columns is not None:
            result[Attribute(path, "in_channels")] = columns * module.groups
        elif rows is not None and module.groups > 1 and module.weight.shape[1] == 1:
            result[Attribute(path, "in_channels")] = rows * module.in_channels // module.out_channels
    else:
        if rows is not None:
            result[Attribute(path, "in_channels")] = rows
        if columns is not None:
            result[Attribute(path, "out_channels")] = columns * module.groups
    return result
