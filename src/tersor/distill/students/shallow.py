"""Students that are layers of the teacher, with its weights.

Spread evenly, as DistilBERT takes one layer out of two (Sanh et al. 2019, https://arxiv.org/abs/1910.01108) and
"shrink and fine-tune" copies layers that are maximally spaced (Shleifer & Rush 2020,
https://arxiv.org/abs/2010.13002); the first ones, as Patient Knowledge Distillation (Sun et al. 2019,
https://arxiv.org/abs/1908.09355) and BERT-of-Theseus (Xu et al. 2020, https://arxiv.org/abs/2002.02925); or the last.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.core.surgery import Change, Shrink, SkippedBlock, Surgery
from tersor.distill.students.counted import count_changes, follow_lists, renumber_others, renumberings
from tersor.distill.students.repeats import Repeats, find_repeats
from tersor.distill.students.sizes import spread
from tersor.errors import ConfigError, ModelError
from tersor.graph import apply_surgery
from tersor.graph.coupling import runs_of
from tersor.graph.coupling.couple import run_model

Keep = Literal["spread", "first", "last"]


@dataclass(frozen=True)
class Student:
    """A student made of the teacher's layers.

    Attributes:
        module: A copy that shares nothing with the teacher, ready to be trained: in the teacher's mode, every parameter
            takes gradients.
        surgery: What makes a model of the teacher's class into one of the student's shape, as data: see
            `tersor.graph.apply_surgery`. None if no surgery can say it: a configuration holds a value per layer, and
            the student's are no beginning of the teacher's; or layers have their numbers in different places.
        layers: Path of a list of layers -> positions, in the teacher, of those that stayed.
    """

    module: nn.Module
    surgery: Surgery | None
    layers: Mapping[str, tuple[int, ...]]


def every_kth(
    teacher: nn.Module,
    *,
    layers: int | Sequence[int],
    keep: Keep = "spread",
    path: str | Sequence[str] | None = None,
    example_inputs: Any = None,
) -> Student:
    """A copy of the teacher with fewer layers.

    `spread` keeps layer `round(i · (n - 1) / (k - 1))` for `i = 0 … k - 1`: k of n, the first and the last among them.
    Of 12 layers 6 are 0, 2, 4, 7, 9, 11: DistilBERT's.

    ```python
    student = every_kth(teacher, layers=6)
    student.module, student.layers  # {"bert.encoder.layer": (0, 2, 4, 7, 9, 11)}
    ```

    Layers that an `nn.ModuleList` holds are numbered anew, also where they know their number (`layer_idx`, by which
    caches of keys and values go), and attributes that count them follow (`config.num_hidden_layers`). Layers of an
    `nn.Sequential` keep their names; the identity stands where others were.

    Args:
        teacher: Stays as it is.
        layers: How many layers stay in the longest list; other lists (a decoder, further stages) shrink in proportion.
            Or positions of those that stay, which need a `path` if lists differ.
        keep: Which ones stay, if `layers` is a number. Layers that cannot go stay in any case and count.
        path: Of the list, or lists, of layers; by default all rows of repeated blocks that hold parts of their own.
            What runs side by side, such as experts, looks the same: then a path is needed.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keywords, or a list of several of these.
            With them it is tried if the student answers in the teacher's shapes.

    Raises:
        ConfigError: if `layers` does not fit the lists, or a path is no list.
        ModelError: if nothing is repeated, or the student does not answer like the teacher.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"keep: expected one of {list(get_args(Keep))}, got {keep!r}")
    rows = find_repeats(teacher, [path] if isinstance(path, str) else path)
    kept = _chosen(rows, layers, keep)
    surgery = _surgery(teacher, rows, kept)
    module = apply_surgery(copy.deepcopy(teacher), surgery).requires_grad_(True)
    replayable = True
    for shrink in surgery.shrunk:
        replayable &= follow_lists(module, shrink)
        replayable &= renumber_others(teacher, module, shrink)
    if example_inputs is not None:
        _try(teacher, module, example_inputs, [row.path for row in rows])
    found: dict[str, tuple[int, ...]] = {}
    for row, blocks in zip(rows, kept, strict=True):
        found[row.path] = (*found.get(row.path, ()), *blocks)
    return Student(module, surgery if replayable else None, found)


def _chosen(rows: Sequence[Repeats], layers: int | Sequence[int], keep: Keep) -> list[tuple[int, ...]]:
    if isinstance(layers, int) and not isinstance(layers, bool):
        longest = max(rows, key=lambda row: len(row.blocks))
        count = len(longest.blocks)
        if not longest.least <= layers <= count:
            reason = f", {list(longest.fixed)} must stay" if longest.fixed else ""
            raise ConfigError(
                f"layers: expected {longest.least} to {count}, for {longest.path!r} has {count}{reason}; got {layers}"
            )
        return [_pick(row, max(row.least, (2 * len(row.blocks) * layers + count) // (2 * count)), keep) for row in rows]
    if isinstance(layers, bool | str) or not all(type(position) is int for position in layers):
        raise ConfigError(f"layers: expected a number, or positions of layers, got {layers!r}")
    if len({row.blocks for row in rows}) > 1:
        names = [f"{row.path!r} {row.blocks[0]} … {row.blocks[-1]}" for row in rows]
        raise ConfigError(f"layers: positions need a path, for there are several lists: {', '.join(names)}")
    return [_named(row, layers) for row in rows]


def _named(row: Repeats, layers: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(layers)
    if not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(row.blocks):
        raise ConfigError(
            f"layers: expected ascending positions of blocks of {row.path!r}, which are {row.blocks[0]} to "
            f"{row.blocks[-1]}, got {list(wanted)}"
        )
    if not set(row.fixed) <= set(wanted):
        raise ConfigError(
            f"layers: {list(row.fixed)} of {row.path!r} must stay, for they have other shapes than their neighbours or "
            f"a stride; got {list(wanted)}"
        )
    return wanted


def _pick(row: Repeats, count: int, keep: Keep) -> tuple[int, ...]:
    free = [block for block in row.blocks if block not in row.fixed]
    if keep != "spread":
        rest = count - len(row.fixed)
        return tuple(sorted((*row.fixed, *(free[:rest] if keep == "first" else free[len(free) - rest :]))))
    chosen = {row.blocks[index] for index in spread(len(row.blocks), count)}
    for fixed in row.fixed:
        if fixed not in chosen:
            chosen.remove(min(chosen.difference(row.fixed), key=lambda block: (abs(block - fixed), -block)))
            chosen.add(fixed)
    return tuple(sorted(chosen))


def _surgery(teacher: nn.Module, rows: Sequence[Repeats], kept: Sequence[tuple[int, ...]]) -> Surgery:
    skipped: list[SkippedBlock] = []
    lists: dict[str, tuple[int, tuple[int, ...]]] = {}
    for row, blocks in zip(rows, kept, strict=True):
        if row.listed:
            before = lists.get(row.path, (row.size, tuple(range(row.size))))[1]
            stays = row.kept_of_list(blocks)
            lists[row.path] = (row.size, tuple(position for position in before if position in stays))
        else:
            skipped += [SkippedBlock(path=row.path_of(block)) for block in row.blocks if block not in blocks]
    shrunk = [Shrink(path=path, size=size, kept=stays) for path, (size, stays) in lists.items() if len(stays) < size]
    changes: dict[tuple[str, str, int | None], Change] = {}
    for shrink in shrunk:
        for change in (*count_changes(teacher, shrink), *renumberings(teacher, shrink)):
            changes[change.owner, change.name, change.position] = change
    return Surgery(skipped=tuple(skipped), shrunk=tuple(shrunk), changes=tuple(changes.values()))


def _try(teacher: nn.Module, student: nn.Module, example_inputs: Any, paths: Sequence[str]) -> None:
    def shapes(module: nn.Module) -> list[list[tuple[int, ...]]]:
        copied = copy.deepcopy(module).eval()
        with torch.no_grad():
            answers = [run_model(copied, *copy.deepcopy(run)) for run in runs_of(example_inputs)]
        return [[tuple(leaf.shape) for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)] for answer in answers]

    expected = shapes(teacher)
    hint = f"of {list(dict.fromkeys(paths))} some are no layers, one after another; name the lists that are with path"
    try:
        found = shapes(student)
    except ModelError as error:
        raise ModelError(f"the teacher with fewer layers does not run: {error}; {hint}") from error
    if found != expected:
        raise ModelError(f"the teacher with fewer layers must answer in shapes {expected}, got {found}; {hint}")
