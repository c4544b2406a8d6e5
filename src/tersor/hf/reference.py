"""`hf:` references of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.core.task import ROLES, Task
from tersor.errors import ConfigError
from tersor.hf.text import text_task

PREFIX = "hf:"
_FORM = "hf:train=FILE,certify=FILE,report=FILE[,max_length=128]"


def model_directory(reference: str) -> Path | None:
    """The directory of `hf:DIR`; None if the reference is of another kind.

    Raises:
        ConfigError: if there is nothing behind `hf:`.
    """
    if not reference.startswith(PREFIX):
        return None
    directory = reference.removeprefix(PREFIX)
    if not directory:
        raise ConfigError("--model: expected hf:DIR, got 'hf:' alone")
    return Path(directory)


def parse_task(reference: str, directory: Path, num_labels: int | None = None) -> Task:
    """The task of `hf:train=FILE,certify=FILE,…`, with the tokenizer of `directory`.

    Raises:
        ConfigError: naming the part that is wrong.
        DataError: as `text_task` does.
    """
    settings: dict[str, Any] = {}
    for part in reference.removeprefix(PREFIX).split(","):
        name, separator, value = (text.strip() for text in part.partition("="))
        if not separator or not value:
            raise ConfigError(f"--task: expected {_FORM}, got {part!r}")
        if name not in (*ROLES, "max_length"):
            raise ConfigError(f"--task: expected one of {', '.join(ROLES)} or max_length, got {name!r}")
        if name in settings:
            raise ConfigError(f"--task: {name} is given twice")
        settings[name] = _length(value) if name == "max_length" else Path(value)
    return text_task(directory, num_labels=num_labels, **settings)


def _length(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--task: max_length must be a whole number, got {text!r}")
    return int(text)
