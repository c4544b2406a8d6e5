"""One batch of a task, whatever its container: what goes into the model, and the labels.

Shapes: `B` batch. Every tensor has `B` as its first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import DataError, NonFiniteError, OutputError

LABEL_KEYS = ("labels", "label")


@dataclass(frozen=True)
class Batch:
    """The model's arguments (positional or by keyword) and the labels, if there are any.

    Attributes:
        args: Positional arguments.
        kwargs: Arguments by keyword.
        labels: One per example.
        positions: Where the examples stand in their split, `[B]`, if they come from one.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor | None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """The inputs by name; positional ones are called `0`, `1` and so on."""
        return {str(index): value for index, value in enumerate(self.args)} | self.kwargs

    def call(self, function: Any) -> Any:
        """Calls a module or session with the inputs."""
        return function(*self.args, **self.kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor of it put through `function`, e.g. moved to a device or cut."""
        return Batch(
            tuple(function(value) for value in self.args),
            {name: function(value) for name, value in self.kwargs.items()},
            None if self.labels is None else function(self.labels),
            None if self.positions is None else function(self.positions),
        )

    def check_finite(self, where: str) -> None:
        """Raises `NonFiniteError` if an input holds NaN or Inf; `where` names split and batch."""
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(
                    f"input {name!r} of {where} must be finite, but {bad} of {tensor.numel()} values are NaN or "
                    "Inf; clean the data before compressing"
                )


def as_batch(item: Any, where: str = "batch") -> Batch:
    """Reads a collated item: a tensor (inputs only), `(x, …, labels)`, `(x,)`, a dict; a batch stays."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,), {}, None)
    if isinstance(item, Mapping):
        fields = {str(key): value for key, value in item.items()}
        label = next((fields.pop(key) for key in LABEL_KEYS if key in fields), None)
        if not fields or not all(isinstance(value, Tensor) for value in fields.values()):
            raise DataError(f"{where}: expected a dict of tensors, got {_describe(item)}")
        if label is not None and not isinstance(label, Tensor):
            raise DataError(f"{where}: labels must be a tensor, got {_describe(label)}")
        return Batch((), fields, label)
    if isinstance(item, Sequence) and item and all(isinstance(value, Tensor) for value in item):
        if len(item) == 1:
            return Batch((item[0],), {}, None)
        return Batch(tuple(item[:-1]), {}, item[-1])
    raise DataError(
        f"{where}: expected a tensor, a tuple (inputs…, labels) or a dict of tensors, got {_describe(item)}; "
        "pass Task(collate=...) if your examples need their own collation"
    )


def select_output(output: Any, declared: str | int | None) -> Tensor:
    """Takes the tensor that the task is about out of what the model returned.

    Raises:
        OutputError: if the model returns several values and none was declared, or the declared one is missing.
    """
    if isinstance(output, Tensor):
        if declared is None:
            return output
        raise OutputError(f"Task(output={declared!r}) is declared, but the model returns one tensor; leave output out")
    if isinstance(output, Mapping):
        names: list[str | int] = list(output)
    elif isinstance(output, Sequence):
        names = list(range(len(output)))
    else:
        names = []
    if declared is None:
        hint = f"; declare one, e.g. Task(output={names[0]!r})" if names else ""
        raise OutputError(f"the model returns {_describe(output)}, expected one tensor{hint}")
    try:
        value = output[declared]
    except (KeyError, IndexError, TypeError):
        raise OutputError(
            f"Task(output={declared!r}) is not in what the model returns: {_describe(output)}; it has {names}"
        ) from None
    if not isinstance(value, Tensor):
        raise OutputError(f"output {declared!r} must be a tensor, got {type(value).__name__}")
    return value


class Flattened(nn.Module):
    """Wraps a model so that it takes all inputs by position, keywords last, and returns the declared output only.

    `torch.export` needs that: with `**kwargs` it fails on dynamic shapes.
    """

    def __init__(self, module: nn.Module, keywords: tuple[str, ...], declared: str | int | None) -> None:
        super().__init__()
        self.module = module
        self.keywords = keywords
        self.declared = declared

    def forward(self, *inputs: Tensor) -> Tensor:
        """Runs the model and selects."""
        positional = len(inputs) - len(self.keywords)
        named = dict(zip(self.keywords, inputs[positional:], strict=True))
        return select_output(self.module(*inputs[:positional], **named), self.declared)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {[type(part).__name__ for part in value][:4]}"
    return f"a {type(value).__name__}"
