"""A split of a task's data: a list of examples with a role, a fingerprint and batches.

Shapes: `N` examples, `B` batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from tersor.core.batch import Batch, as_batch
from tersor.errors import DataError

Collate = Callable[[list[Any]], Any]


class _Columns(Dataset[dict[str, Tensor]]):
    """Tensors by name, all with the same first dimension."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def as_dataset(data: Any, name: str) -> Dataset[Any]:
    """Accepts a map-style Dataset, a tensor, a tuple of tensors or arrays, or a dict of tensors.

    Raises:
        DataError: if it is none of these, has no length, or lengths differ.
    """
    if isinstance(data, np.ndarray | Tensor):
        data = (data,)
    if isinstance(data, Mapping):
        columns = {str(key): _as_tensor(value, name) for key, value in data.items()}
        _check_lengths(columns, name)
        return _Columns(columns)
    if isinstance(data, tuple) and data and all(isinstance(part, np.ndarray | Tensor) for part in data):
        tensors = [_as_tensor(part, name) for part in data]
        _check_lengths({str(index): tensor for index, tensor in enumerate(tensors)}, name)
        return TensorDataset(*tensors)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | bytes):
        return cast("Dataset[Any]", data)
    raise DataError(
        f"split {name!r}: expected a map-style Dataset, tensors (x, y) or a dict of tensors, "
        f"got {type(data).__name__}; wrap an iterable in a list first"
    )


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"split {name!r}: expected numbers, got {type(values).__name__} ({error})") from None
    if tensor.ndim == 0:
        raise DataError(f"split {name!r}: expected one row per example, got a single number")
    return tensor


def _check_lengths(columns: Mapping[str, Tensor], name: str) -> None:
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"split {name!r}: all tensors must have the same first dimension, got {lengths}")


class Split:
    """Examples `dataset[indices]` under a name.

    Args:
        name: `train`, `calibrate`, `search`, `certify` or `report`.
        data: Whatever `as_dataset` accepts.
        indices: Which examples of it; None means all.
        collate: Turns a list of examples into a batch; None uses PyTorch's default.
    """

    def __init__(
        self, name: str, data: Any, *, indices: Sequence[int] | None = None, collate: Collate | None = None
    ) -> None:
        self.name = name
        dataset = as_dataset(data, name)
        chosen = np.asarray(indices if indices is not None else range(len(cast("Sized", dataset))), dtype=np.int64)
        while isinstance(dataset, Subset):  # look through to the common base, so that overlaps show
            chosen = np.asarray(dataset.indices, dtype=np.int64)[chosen]
            dataset = dataset.dataset
        self.dataset = dataset
        self.indices = chosen
        self.collate = collate
        if len(self) == 0:
            raise DataError(f"split {name!r} is empty; give it examples or leave it out")

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Sequence[int] | np.ndarray[Any, Any]) -> Batch:
        """The examples at these positions of the split, collated."""
        where = f"split {self.name!r}"
        positions = np.asarray(positions, dtype=np.int64)
        batch = self._collated(self.indices[positions], where)
        return replace(batch, positions=torch.from_numpy(positions.copy()))

    def _collated(self, chosen: np.ndarray[Any, Any], where: str) -> Batch:
        if self.collate is None and isinstance(self.dataset, TensorDataset | _Columns):
            return as_batch(self.dataset[torch.from_numpy(chosen)], where)
        items = [self.dataset[int(index)] for index in chosen]
        if self.collate is not None:
            return as_batch(self.collate(items), where)
        try:
            return as_batch(default_collate(items), where)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"{where}: examples do not stack into a batch ({str(error).splitlines()[0]}); "
                "pass Task(collate=...) to pad them"
            ) from None

    def batches(self, size: int, *, order: np.ndarray[Any, Any] | None = None) -> Iterator[Batch]:
        """All examples in batches of `size`, in the split's order or in the given one."""
        positions = np.arange(len(self)) if order is None else order
        for start in range(0, len(positions), size):
            yield self.batch(positions[start : start + size])

    def shuffled(self, size: int, seed: int) -> Iterator[Batch]:
        """All examples in a random order that `seed` fixes."""
        return self.batches(size, order=np.random.default_rng(seed).permutation(len(self)))

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels `[N, …]`, or None without."""
        labels = [batch.labels for batch in self.batches(256)]
        return None if labels[0] is None else torch.cat(cast("list[Tensor]", labels))

    @cached_property
    def keys(self) -> list[bytes]:
        """A content hash per example, over its inputs (labels left out)."""
        keys: list[bytes] = []
        # One by one where a collation may pad: an example's hash must not depend on its neighbours.
        for batch in self.batches(256 if self.collate is None else 1):
            tensors = sorted(batch.tensors().items())
            for row in range(len(batch)):
                digest = hashlib.blake2b(digest_size=16)
                for name, tensor in tensors:
                    digest.update(f"{name}{tensor.dtype}".encode())
                    digest.update(tensor[row].contiguous().flatten().view(torch.uint8).numpy().tobytes())
                keys.append(digest.digest())
        return keys

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the set of examples: the same in any order."""
        return hashlib.sha256(b"".join(sorted(self.keys))).hexdigest()[:32]
