"""Sentences with labels as a task: tab-separated files in, batches padded to their longest sentence out.

Shapes: `B` batch, `T` tokens of the longest sentence in the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tersor.core.metrics import Metric
from tersor.core.task import Task
from tersor.errors import ConfigError, DataError
from tersor.hf.directory import Checkpoint, open_directory

# What varies beside the batch: Target(..., dynamic=DYNAMIC).
DYNAMIC: dict[str, dict[int, str]] = {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}
ATTACHED = "tokenizer"
MEASURING = ("search", "certify", "report")

logger = logging.getLogger("tersor")


def text_task(
    directory: str | Path,
    *,
    train: str | Path | None = None,
    calibrate: str | Path | None = None,
    search: str | Path | None = None,
    certify: str | Path | None = None,
    report: str | Path | None = None,
    max_length: int = 128,
    metric: str | Metric | Callable[[Tensor, Tensor], float] = "top1",
    num_labels: int | None = None,
) -> Task:
    """A task of labelled sentences for a model from `load_model`; the tokenizer travels along in the artifact.

    Each file has lines `sentence<TAB>label` in UTF-8, no header; labels are 0, 1, …. What stands in a measuring split
    too is left out of `train` and `calibrate`, and a line on the log says so; two measuring splits that share a
    sentence are an error.

    Args:
        directory: Where the tokenizer and `config.json` are.
        train: File of the split `train`; the others likewise. See `tersor.Task`.
        calibrate: See there.
        search: See there.
        certify: See there.
        report: See there.
        max_length: Tokens after which a sentence is cut, special tokens included.
        metric: See there.
        num_labels: Labels that the model knows; by default what the directory's configuration says, which for a
            plain encoder is nothing.

    Raises:
        ConfigError: if the directory has no usable tokenizer, or `max_length` is out of range.
        DataError: naming file and line, if a line is malformed or its label is out of range.
        RuntimeUnavailableError: if `transformers` is not installed.
    """
    checkpoint = open_directory(directory)
    tokenizer = checkpoint.tokenizer()
    _check_length(checkpoint, tokenizer, max_length)
    if num_labels is None and checkpoint.classifier:
        num_labels = int(checkpoint.config.num_labels)
    files = {"train": train, "calibrate": calibrate, "search": search, "certify": certify, "report": report}
    splits = {
        role: _tokenised(read_tsv(file, num_labels), tokenizer, max_length, Path(file))
        for role, file in files.items()
        if file is not None
    }
    inputs: dict[str, Any] = dict(_disjoint(splits))
    return Task(
        **inputs,
        metric=metric,
        collate=partial(_padded, padding=int(tokenizer.pad_token_id)),
        class_names=checkpoint.class_names,
        preprocessing=(
            f"text: AutoTokenizer.from_pretrained('{ATTACHED}') of transformers on the artifact's directory "
            f"{ATTACHED}/, cut to {max_length} tokens, padded on the right to the longest of the batch; input_ids and "
            "attention_mask as int64"
        ),
        attachments={f"{ATTACHED}/{name}": path for name, path in checkpoint.tokenizer_files().items()},
    )


@dataclass(frozen=True)
class Sentences:
    """What a file holds, in its order."""

    texts: list[str]
    labels: list[int]


def read_tsv(file: str | Path, num_labels: int | None = None) -> Sentences:
    """Reads `sentence<TAB>label` lines.

    Raises:
        DataError: naming file and line, if the file is missing or empty, is no UTF-8, a line has not exactly one tab,
            or a label is no integer in `0..num_labels - 1`.
    """
    path = Path(file)
    if path.suffix != ".tsv":
        raise DataError(f"{path}: expected a .tsv file of sentence<TAB>label lines")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = Sentences([], [])
    for number, line in enumerate(content.removesuffix("\n").split("\n"), start=1):
        where, (text, *rest) = f"{path}, line {number}", line.removesuffix("\r").split("\t")
        if not content or len(rest) != 1 or not text.strip():
            raise DataError(f"{where}: expected sentence<TAB>label, got {line[:80]!r}")
        found.texts.append(text)
        found.labels.append(_label(rest[0], num_labels, where))
    return found


def _label(text: str, num_labels: int | None, where: str) -> int:
    allowed = "0, 1, …" if num_labels is None else f"0..{num_labels - 1}"
    label = int(text) if text.strip().isascii() and text.strip().isdigit() else -1
    if label < 0 or (num_labels is not None and label >= num_labels):
        raise DataError(f"{where}: expected a label in {allowed}, got {text[:40]!r}; files have no header")
    return label


class _Tokenised(Dataset[dict[str, Tensor]]):
    """Examples `{"input_ids": [T], "labels": []}`, each of its own length."""

    def __init__(self, input_ids: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def keys(self) -> list[bytes]:
        """What the model sees of each example, to compare."""
        return [ids.numpy().tobytes() for ids in self.input_ids]

    def without(self, keys: Set[bytes]) -> _Tokenised:
        """The examples that are none of these."""
        kept = [index for index, key in enumerate(self.keys()) if key not in keys]
        return _Tokenised([self.input_ids[index] for index in kept], [self.labels[index] for index in kept])


def _tokenised(sentences: Sentences, tokenizer: Any, max_length: int, path: Path) -> _Tokenised:
    encoded = tokenizer(
        sentences.texts,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise DataError(f"{path}, line {number}: the tokenizer makes no token of {sentences.texts[number - 1]!r}")
    return _Tokenised([torch.tensor(ids) for ids in encoded], [torch.tensor(label) for label in sentences.labels])


def _disjoint(splits: Mapping[str, _Tokenised]) -> dict[str, _Tokenised]:
    """The splits, with what is measured on left out of what is learned from."""
    found = dict(splits)
    measured = {key for role in MEASURING if role in splits for key in splits[role].keys()}  # noqa: SIM118 - no mapping
    for role in sorted(set(splits) - set(MEASURING)):
        found[role] = splits[role].without(measured)
        left_out = len(splits[role]) - len(found[role])
        if left_out:
            logger.warning(
                "%d of %d sentences of %s also stand in a split that measures and were left out of %s",
                left_out, len(splits[role]), role, role,
            )  # fmt: skip
    return found


def _padded(examples: Sequence[Mapping[str, Tensor]], *, padding: int) -> dict[str, Tensor]:
    """`input_ids` `[B, T]`, `attention_mask` `[B, T]` and `labels` `[B]`."""
    rows = [example["input_ids"] for example in examples]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": torch.stack([example["labels"] for example in examples]),
    }


def _check_length(checkpoint: Checkpoint, tokenizer: Any, max_length: int) -> None:
    shortest, longest = int(tokenizer.num_special_tokens_to_add()) + 1, checkpoint.longest(tokenizer)
    if not shortest <= max_length <= longest:
        raise ConfigError(f"max_length: {checkpoint.path} takes {shortest} to {longest} tokens, got {max_length}")
