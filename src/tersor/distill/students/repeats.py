"""Repeated blocks of a model, found by structure alone: no example input is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from tersor.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Repeats:
    """A row of blocks of one class in an `nn.ModuleList` or `nn.Sequential`.

    Attributes:
        path: Of the list.
        listed: Whether it is an `nn.ModuleList`, whose code counts its modules.
        names: Of all modules in the list.
        blocks: Positions of the blocks in it, ascending.
        fixed: Those of them that must stay, because their neighbours have other shapes or they reduce the size.
    """

    path: str
    listed: bool
    names: tuple[str, ...]
    blocks: tuple[int, ...]
    fixed: tuple[int, ...]

    @property
    def size(self) -> int:
        """Length of the list."""
        return len(self.names)

    @property
    def least(self) -> int:
        """How many blocks must stay."""
        return max(1, len(self.fixed))

    def path_of(self, position: int) -> str:
        """Path of a module in the list."""
        return f"{self.path}.{self.names[position]}".lstrip(".")

    def kept_of_list(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Positions that stay in the list if `blocks` are the blocks that stay: whatever is no block stays too."""
        gone = set(self.blocks) - set(blocks)
        return tuple(position for position in range(self.size) if position not in gone)


def find_repeats(model: nn.Module, paths: Sequence[str] | None = None) -> list[Repeats]:
    """Rows of blocks, in the model's order; of rows inside blocks only the outer ones.

    A row is two or more neighbours of one class. Those can go whose parameters have the shapes of a neighbour's, which
    may have further ones: what follows on a module with the same shapes answers in the form of its input. A block that
    holds a layer with a stride cannot go.

    Args:
        model: Any module.
        paths: Only these lists. By default all whose blocks have parts of their own, which leaves out parallel heads.

    Raises:
        ConfigError: if a path is no list of the model, or leads into a block of another one.
        ModelError: if nothing is repeated.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    unknown = [path for path in paths or () if path not in lists]
    if unknown:
        raise ConfigError(
            f"path: expected an nn.ModuleList or nn.Sequential of the model, got {unknown}; it has {list(lists)[:12]}"
        )
    found: list[Repeats] = []
    inside: set[str] = set()
    for path, module in lists.items():
        if paths is not None and path not in paths:
            continue
        if any(path == block or path.startswith(f"{block}.") for block in inside):
            if paths is not None:
                raise ConfigError(
                    f"path: {path!r} is inside a layer of another list of {list(paths)}; take one of them"
                )
            continue
        for row in _rows(path, module):
            first = module[row.blocks[0]]
            composite = next(first.children(), None) is not None and not isinstance(first, nn.ModuleList)
            if paths is not None or composite:
                found.append(row)
                inside |= {row.path_of(block) for block in row.blocks}
    without = [path for path in paths or () if path not in {row.path for row in found}]
    if not found or without:
        raise ModelError(
            f"{type(model).__name__} has no repeated blocks{f' in {without}' if without else ''}: expected "
            "an nn.ModuleList or nn.Sequential with neighbours of one class and equal parameter shapes; write the "
            "student as a module of your own, or prune the teacher"
        )
    return found


def _rows(path: str, modules: nn.ModuleList | nn.Sequential) -> Iterator[Repeats]:
    children, listed = list(modules), isinstance(modules, nn.ModuleList)
    start = 0
    for position in range(1, len(children) + 1):
        if position < len(children) and type(children[position]) is type(children[start]):
            continue
        free = _free(children, start, position)
        alone = len({id(child) for child in children[start:position]}) == position - start
        if free and (alone or listed):  # skipping a module skips it wherever it is
            blocks = tuple(range(start, position))
            fixed = tuple(block for block in blocks if block not in free)
            yield Repeats(path, listed, tuple(modules._modules), blocks, fixed)
        start = position


def _free(children: Sequence[nn.Module], start: int, stop: int) -> set[int]:
    shapes = [_shapes(child) for child in children[start:stop]]
    equal = {
        start + index
        for index, shape in enumerate(shapes)
        if shape and any(shape <= near for near in (*shapes[max(index - 1, 0) : index], *shapes[index + 1 : index + 2]))
    }
    return {position for position in equal if not _strided(children[position])}


def _shapes(module: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes of parameters."""
    return {(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}


def _strided(module: nn.Module) -> bool:
    for part in module.modules():
        stride = getattr(part, "stride", 1)
        if isinstance(stride, int | tuple) and set(stride if isinstance(stride, tuple) else (stride,)) - {1}:
            return True
    return False
