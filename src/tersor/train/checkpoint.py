"""Checkpoints of a running training: one file, replaced as a whole, read without executing anything.

The file is what `torch.save` writes, with the SHA-256 of it behind: PyTorch itself does not notice a changed weight.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.files import write_whole
from tersor.core.weights import tensors_hash
from tersor.errors import ConfigError, IntegrityError, OutputDirectoryError
from tersor.train.average import tensors_of
from tersor.train.schedule import Schedule

FILE = "training.pt"
DIGEST = 32  # bytes
FORMAT = 1  # of what a checkpoint holds
PLAIN = {bool, int, float, str, type(None)}
# Fields of a schedule that change where and how a training runs, not what it is.
ELSEWHERE = {"workers", "device", "parallel"}


@dataclass(frozen=True)
class Checkpoints:
    """Where the state of a training is kept and how often.

    Attributes:
        directory: Made when the first checkpoint is written.
        identity: What the caller knows about data, loss and teacher; a checkpoint of another training is refused.
        every_steps: Optimizer steps between two checkpoints; None for `every_seconds`.
        every_seconds: Seconds between two checkpoints.
    """

    directory: Path
    identity: str = ""
    every_steps: int | None = None
    every_seconds: float = 60.0

    def __post_init__(self) -> None:
        if (self.every_steps is not None and self.every_steps < 1) or not self.every_seconds >= 0:
            raise ConfigError(
                f"Checkpoints: expected every_steps from 1 on and every_seconds from 0 on, got {self.every_steps} and "
                f"{self.every_seconds}"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.directory) / FILE


class Keeper:
    """Reads and writes the checkpoints of one training."""

    def __init__(self, settings: Checkpoints, fingerprint: str) -> None:
        self.settings, self.fingerprint = settings, fingerprint
        self._written, self._step = time.monotonic(), 0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` steps are done."""
        if self.settings.every_steps is not None:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self._written >= self.settings.every_seconds

    def write(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint.

        Raises:
            ConfigError: if a state holds what could not be read again without executing code.
            OutputDirectoryError: if the disk is full or read-only.
        """
        _check_plain("", state)
        buffer = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, **state}, buffer)
        buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
        write_whole(self.settings.path, buffer.getvalue())
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The last checkpoint, None without; what a killed process left half written is removed.

        Raises:
            IntegrityError: if the file is damaged.
            OutputDirectoryError: if it belongs to another training.
        """
        path = self.settings.path
        for scratch in path.parent.glob(f".{FILE}.*"):
            scratch.unlink(missing_ok=True)
        if not path.exists():
            return None
        state = _load(path)
        if state["fingerprint"] != self.fingerprint:
            raise OutputDirectoryError(
                f"{path} belongs to another training (weights, data, loss, schedule or seed differ); choose another "
                "directory, or repeat the call as it was to go on"
            )
        return state


def weights_of(directory: Path) -> dict[str, Tensor]:
    """The module's weights in the checkpoint there, for `load_state_dict`: to start another training from them.

    Raises:
        IntegrityError: if the checkpoint is missing or damaged.
    """
    path = Checkpoints(directory).path
    if not path.exists():
        raise IntegrityError(f"{directory} has no checkpoint of a training: {FILE} is missing")
    prefix = "module."
    weights = _load(path)["objective"].items()
    return {name.removeprefix(prefix): value for name, value in weights if name.startswith(prefix)}


def _load(path: Path) -> dict[str, Any]:
    """The content, checked; nothing in it is executed."""
    content = path.read_bytes()
    try:
        if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
            raise ValueError("its hash is wrong")
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _ = state["fingerprint"], state["objective"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"{path} is damaged ({reason}); remove it to train from the start") from None
    return state


def _check_plain(where: str, value: Any) -> None:
    """Refuses at once what only reading would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(f"{where}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_plain(f"{where}[{position}]", item)
    elif not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise ConfigError(
            f"the state {where} of a training is a {type(value).__module__}.{type(value).__name__}; a checkpoint holds "
            "tensors, numbers, strings, lists and dicts only"
        )


def fingerprint_of(module: nn.Module, schedule: Schedule, *facts: object) -> str:
    """Hash of what makes this training this training: the weights it starts from, its schedule and other facts."""
    settings = schedule.model_dump(mode="json", exclude=ELSEWHERE)
    known = json.dumps([FORMAT, settings, *facts, tensors_hash(tensors_of(module))], default=str)
    return hashlib.sha256(known.encode()).hexdigest()
