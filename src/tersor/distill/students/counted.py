"""What knows how many layers there are: attributes that count them, numbers of layers, one value per layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tersor.core.surgery import Change, Shrink
from tersor.graph.coupling.integers import is_config, owners

COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
NUMBER = re.compile(r"(layer|block)_?(idx|index|id|number|num)$|^(idx|index)$")
PER_LAYER = re.compile(r"layer|block")
ROLES = ("encoder", "decoder")


def count_changes(model: nn.Module, shrink: Shrink) -> Iterator[Change]:
    """Changes of the attributes that count the modules of a list.

    They are looked for in the modules around the list and in their configurations, by name and value. Of an encoder and
    a decoder with one configuration the names say whose number it is; one without a name is the encoder's. A list that
    is part of a numbered stage is counted inside the stage, or by `depths` at the stage's number.
    """
    stage = _stage(model, shrink.path)
    if stage:
        number = int(stage.rpartition(".")[2])
        for owner, attributes in owners(model):
            depths = attributes.get("depths")
            if isinstance(depths, list | tuple) and list(depths)[number : number + 1] == [shrink.size]:
                after = len(shrink.kept)
                yield Change(owner=owner, name="depths", position=number, before=shrink.size, after=after)
    for owner, attributes in _around(model, shrink.path):
        for name in _own(owner, shrink.path, [name for name in COUNTS if attributes.get(name) == shrink.size]):
            if type(attributes[name]) is int:
                yield Change(owner=owner, name=name, before=shrink.size, after=len(shrink.kept))


def renumberings(model: nn.Module, shrink: Shrink) -> Iterator[Change]:
    """Changes of the numbers that the modules of a list, or modules in them, have of themselves.

    Owners are named as the list is numbered; a layer that moves up takes the number that its predecessor there had.
    """
    for (inner, name), start in _in_all(_modules(model, shrink.path)).items():
        for position, origin in enumerate(shrink.kept):
            if position != origin:
                owner = ".".join(part for part in (shrink.path, str(position), inner) if part)
                yield Change(owner=owner, name=name, before=start + position, after=start + position)


def renumber_others(teacher: nn.Module, model: nn.Module, shrink: Shrink) -> bool:
    """Writes, in place, the numbers that only some modules of a list have, at places where others have no such part.

    Args:
        teacher: The model before the surgery.
        model: The one after it.
        shrink: Of the list.

    Returns:
        Whether there were none to write.
    """
    before, none = _modules(teacher, shrink.path), True
    done = _in_all(before)
    for position, (origin, module) in enumerate(zip(shrink.kept, _modules(model, shrink.path), strict=True)):
        for inner, part in module.named_modules():
            for name, value in vars(part).items():
                known = NUMBER.search(name) and type(value) is int and value == origin and (inner, name) not in done
                if known and position != origin:
                    setattr(part, name, position)
                    none = False
    return none


def _modules(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path)._modules.values())  # type: ignore[arg-type]  # lists have no None


def _in_all(modules: Sequence[nn.Module]) -> dict[tuple[str, str], int]:
    """Numbers that all modules of a list have of themselves: place and name of the attribute -> the first's number."""
    found = {}
    for inner, part in modules[0].named_modules():
        for name in vars(part):
            numbers = [_number(module, inner, name) for module in modules] if NUMBER.search(name) else []
            start = numbers[0] if numbers else None
            if start is not None and numbers == list(range(start, start + len(modules))):
                found[inner, name] = start
    return found


def follow_lists(model: nn.Module, shrink: Shrink) -> bool:
    """Shortens, in place, lists of the configurations that hold a value per layer, such as `layer_types`.

    Args:
        model: Whose list of layers has been shortened.
        shrink: How.

    Returns:
        Whether every layer would find its value without that, at its new number.
    """
    path, size, kept, same = shrink.path, shrink.size, shrink.kept, True
    for owner, attributes in _around(model, path):
        if not _is_configuration(model, owner):
            continue
        lists = [
            name
            for name, value in attributes.items()
            if isinstance(value, list | tuple) and len(value) == size and PER_LAYER.search(name)
        ]
        for name in _own(owner, path, lists):
            values = [attributes[name][position] for position in kept]
            same &= values == list(attributes[name][: len(kept)])
            attributes[name] = type(attributes[name])(values)
    return same


def _around(model: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Modules that hold the list, and their configurations, each once: path and attributes."""
    parts = path.split(".")
    stage = _stage(model, path)
    ancestors = {".".join(parts[:count]) for count in range(len(parts))} - {path}
    ancestors = {ancestor for ancestor in ancestors if f"{ancestor}.".startswith(f"{stage}.") or not stage}
    held = {
        id(value.__dict__)
        for ancestor in ancestors
        for value in vars(model.get_submodule(ancestor)).values()
        if is_config(value)
    }
    for owner, attributes in owners(model):
        if owner in ancestors or (id(attributes) in held and (f"{owner}.".startswith(f"{stage}.") or not stage)):
            yield owner, attributes


def _stage(model: nn.Module, path: str) -> str:
    """The innermost module of another list that the list at `path` is in; empty if there is none."""
    parts = path.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    inside = (
        name
        for name in around
        if name.rpartition(".")[2].isdecimal()
        and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
    )
    return next(inside, "")


def _own(owner: str, path: str, names: Sequence[str]) -> list[str]:
    """Those of the names that are about the list at `path`."""
    parts = path.split(".")
    branch = next((index for index in reversed(range(len(parts))) if _role(parts[index])), None)
    role = None if branch is None else _role(parts[branch])
    own = [name for name in names if _role(name) == role] if role else []
    general = [name for name in names if _role(name) is None]
    shared = branch is None or not f"{owner}.".startswith(f"{'.'.join(parts[: branch + 1])}.")
    return own if role == "decoder" and own and shared else [*own, *general]


def _role(name: str) -> str | None:
    return next((role for role in ROLES if role in name), None)


def _is_configuration(model: nn.Module, owner: str) -> bool:
    path, _, name = owner.rpartition(".")
    return is_config(vars(model.get_submodule(path)).get(name))


def _number(module: nn.Module, inner: str, name: str) -> int | None:
    try:
        value = vars(module.get_submodule(inner)).get(name)
    except AttributeError:
        return None
    return value if type(value) is int else None
