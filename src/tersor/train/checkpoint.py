"""Checkpoints of a running training: one file, replaced as a whole, read without executing anything."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core.files import write_whole
from tersor.errors import IntegrityError, OutputDirectoryError
from tersor.train.schedule import Schedule

FILE = "training.pt"


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

    @property
    def path(self) -> Path:
        """The file."""
        return self.directory / FILE


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
        """Replaces the checkpoint."""
        buffer = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, **state}, buffer)
        write_whole(self.settings.path, buffer.getvalue())
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The last checkpoint, None without.

        Raises:
            IntegrityError: if the file is damaged.
            OutputDirectoryError: if it belongs to another training.
        """
        path = self.settings.path
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise IntegrityError(f"{path} is damaged ({reason}); remove it to train from the start") from None
        if found != self.fingerprint:
            raise OutputDirectoryError(
                f"{path} belongs to another training (weights, data, loss, schedule or seed differ); choose another "
                "directory, or repeat the call as it was to go on"
            )
        return state


def fingerprint_of(module: nn.Module, schedule: Schedule, *facts: object) -> str:
    """Hash of what makes this training this training: the weights it starts from, its schedule and other facts."""
    digest = hashlib.sha256(json.dumps([schedule.model_dump(mode="json"), *facts], default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
