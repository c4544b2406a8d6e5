"""The task: the data splits, the metric and the loss - everything that depends on the user's problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tersor.core.artifact import check_attachments
from tersor.core.batch import Batch
from tersor.core.metrics import METRICS, Metric, as_metric
from tersor.core.partition import partition
from tersor.core.split import Collate, Split
from tersor.errors import ConfigError, DataError, OverlapError

Role = Literal["train", "calibrate", "search", "certify", "report"]
ROLES: tuple[Role, ...] = ("train", "calibrate", "search", "certify", "report")
DEFAULT_FRACTIONS: dict[str, float] = {"train": 0.5, "search": 0.1, "certify": 0.3, "report": 0.1}
DEFAULT_CALIBRATION = 300
IGNORED = -100  # a label that the default loss leaves out, as PyTorch does: behind the end of a sequence

Loss = Callable[[Tensor, Tensor], Tensor]


class Task:
    """Data, metric and loss.

    Args:
        train: Examples for recovery training. Each split is a map-style Dataset, tensors `(x, y)`, one tensor
            (no labels) or a dict of tensors. Examples are tensors, tuples `(inputs…, label)` or dicts whose
            `labels` or `label` entry is the label.
        calibrate: Examples that set quantization ranges; by default 300 of `train`, seeded.
        search: Examples that may steer a search.
        certify: Examples for the certificate; nothing else ever looks at them.
        report: Examples for the reported numbers.
        metric: A name (`top1`, `f1`, `perplexity`, `agreement`, `cosine`), a `Metric`, or a function
            `(outputs, labels) -> float`. Without labels it becomes `agreement` with the original model.
        loss: `(outputs, labels) -> scalar` for training; cross-entropy by default.
        output: Key or index of the output that counts, if the model returns a dict or tuple.
        collate: Turns a list of examples into a batch.
        class_names: For the report and the artifact.
        preprocessing: One line for whoever runs the artifact: how an input is made.
        attachments: Files that travel along in the artifact, such as a tokenizer's: their places in it, each in a
            directory (`tokenizer/vocab.txt`), and where they are now.
        seed: Fixes every random choice about data.

    Raises:
        OverlapError: if two splits share examples; only `calibrate` may come from `train`.
        DataError: if a split is empty or malformed.
        ConfigError: if an attachment does not exist or its place leads outside.
    """

    def __init__(
        self,
        *,
        train: Any = None,
        calibrate: Any = None,
        search: Any = None,
        certify: Any = None,
        report: Any = None,
        metric: str | Metric | Callable[[Tensor, Tensor], float] = "top1",
        loss: Loss | None = None,
        output: str | int | None = None,
        collate: Collate | None = None,
        class_names: tuple[str, ...] = (),
        preprocessing: str = "",
        attachments: Mapping[str, str | Path] | None = None,
        seed: int = 0,
    ) -> None:
        given = {
            "train": train,
            "calibrate": calibrate,
            "search": search,
            "certify": certify,
            "report": report,
        }
        self.splits: Mapping[str, Split] = {
            role: data if isinstance(data, Split) else Split(role, data, collate=collate)
            for role, data in given.items()
            if data is not None
        }
        if not self.splits:
            raise DataError(f"Task needs at least one split of {list(ROLES)}, got none")
        self.metric = as_metric(metric)
        self.loss: Loss = loss if loss is not None else _cross_entropy
        self.output = output
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.attachments = check_attachments(attachments or {})
        self.seed = seed
        self._check_overlap()
        if "calibrate" not in self.splits and "train" in self.splits:
            self.splits = {
                **self.splits,
                "calibrate": _sample(self.splits["train"], DEFAULT_CALIBRATION, seed),
            }
        if self.metric.needs_labels and not self.labelled:
            self.metric = METRICS["agreement"]

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        metric: str | Metric | Callable[[Tensor, Tensor], float] = "top1",
        seed: int = 0,
        fractions: Mapping[str, float] | None = None,
        **fields: Any,
    ) -> Task:
        """Makes all splits from one dataset: disjoint, seeded, stratified by label where labels allow.

        Identical examples always land in the same split.

        Args:
            dataset: Whatever a split accepts.
            metric: As in `Task`.
            seed: Fixes the splits.
            fractions: Share of each split; their sum is at most 1. Default:
                train 0.5, search 0.1, certify 0.3, report 0.1.
            **fields: Further arguments of `Task`.
        """
        shares = dict(DEFAULT_FRACTIONS if fractions is None else fractions)
        whole = Split("dataset", dataset, collate=fields.get("collate"))
        parts = partition(whole, shares, seed)
        splits: dict[str, Any] = {
            role: Split(role, whole.dataset, indices=cast("Any", whole.indices[positions]), collate=whole.collate)
            for role, positions in parts.items()
        }
        return cls(metric=metric, seed=seed, **splits, **fields)

    @property
    def labelled(self) -> bool:
        """Whether the splits that measure have labels."""
        measuring = [split for role, split in self.splits.items() if role in ("search", "certify", "report")]
        return all(split.batch([0]).labels is not None for split in measuring or self.splits.values())

    def get(self, role: Role) -> Split | None:
        """The split of that role, if there is one."""
        return self.splits.get(role)

    def require(self, role: Role, why: str) -> Split:
        """The split of that role; raises `DataError` naming what needs it."""
        if role not in self.splits:
            raise DataError(f"{why} needs a {role!r} split, but the task has only {sorted(self.splits)}")
        return self.splits[role]

    def example(self, size: int) -> Batch:
        """A batch of exactly `size` real examples, repeated from the start if the split is smaller."""
        split = next(self.splits[role] for role in ("calibrate", "train", *ROLES) if role in self.splits)
        return split.batch(np.arange(size) % len(split))

    def check_smoothing(self, smoothing: float) -> None:
        """Raises `ConfigError` if there is something to smooth and the loss is not the default cross-entropy."""
        if smoothing and self.loss is not _cross_entropy:
            raise ConfigError("label_smoothing changes the default cross-entropy; a loss of your own must do it itself")

    def smoothed_loss(self, outputs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """The loss, with a share `smoothing` of every label given to all classes alike; see `check_smoothing`."""
        self.check_smoothing(smoothing)
        return _cross_entropy(outputs, labels, smoothing) if smoothing else self.loss(outputs, labels)

    def fingerprint(self) -> dict[str, str]:
        """What identifies the data and the metric of a run."""
        return {"metric": self.metric.name, "output": repr(self.output)} | {
            role: split.fingerprint for role, split in self.splits.items()
        }

    def _check_overlap(self) -> None:
        for (role, split), (other_role, other) in combinations(self.splits.items(), 2):
            if {role, other_role} == {"train", "calibrate"}:
                continue
            shared = _shared(split, other)
            if shared:
                raise OverlapError(
                    f"splits {role!r} and {other_role!r} share {len(shared)} example(s), e.g. example {shared[0]} "
                    f"of {role!r}; numbers measured on data that was used before prove nothing. Remove the "
                    "duplicates, or let Task.from_dataset make the splits"
                )


def _shared(split: Split, other: Split) -> list[int]:
    """Positions in `split` whose examples are also in `other`: the same item of one dataset, or equal content."""
    if split.dataset is other.dataset:
        same = np.flatnonzero(np.isin(split.indices, other.indices))
        if len(same):
            return [int(position) for position in same]
    theirs = set(other.keys)
    return [position for position, key in enumerate(split.keys) if key in theirs]


def _sample(split: Split, size: int, seed: int) -> Split:
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split))[:size])
    return Split("calibrate", split.dataset, indices=cast("Any", split.indices[chosen]), collate=split.collate)


def _cross_entropy(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    if labels.is_floating_point():
        raise ConfigError("the default loss is cross-entropy on class labels; pass Task(loss=...) for other labels")
    classes = outputs.shape[-1]
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    if bool(wrong.any()):
        raise DataError(f"training labels must be in 0..{classes - 1}, got {int(labels[wrong].flatten()[0])}")
    return functional.cross_entropy(
        outputs.flatten(0, -2), torch.as_tensor(labels).flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )
