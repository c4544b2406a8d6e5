"""Training in several processes: each takes its share of every batch, and gradients are averaged.

`torchrun --nproc-per-node=4 script.py`, or the same on several machines, sets the environment that `join` reads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersor.errors import ConfigError, DistributedError

LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo", "socket")


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """This process's part of a batch: equal parts, so up to `size - 1` examples of an uneven batch are left out."""
        if self.size == 1:
            return positions
        each = len(positions) // self.size
        if not each:
            raise ConfigError(
                f"a batch of {len(positions)} examples cannot be shared by {self.size} processes; raise batch_size, "
                "or start fewer processes"
            )
        return positions[self.rank * each : (self.rank + 1) * each]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, averaging its gradients over the processes."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        # Losses on features leave a head without gradients, so unused parameters are nothing unusual here.
        return DistributedDataParallel(module, find_unused_parameters=True)

    def accumulating(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients of a wrapped module add up and are not yet exchanged."""
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def mean(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The means over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        distributed.all_reduce(tensor)
        return (tensor / self.size).tolist()

    def from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors with those of the first process, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the loss of another process into a `DistributedError`."""
        if self.size == 1:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
            try:
                yield
            except RuntimeError as error:
                if not any(word in str(error).lower() for word in LOST):
                    raise
                raise DistributedError(
                    f"process {self.rank} of {self.size} lost touch with the others ({str(error).splitlines()[0]}); "
                    "look at the first error among their outputs, then start again: with a directory for checkpoints "
                    "training goes on where it was"
                ) from error


def join(device: torch.device) -> World:
    """The world that `torchrun` or the caller has set up, or a world of one.

    Raises:
        DistributedError: if the other processes cannot be reached.
    """
    if not distributed.is_available():
        return World()
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World()
        try:
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"expected to meet {os.environ['WORLD_SIZE']} processes at "
                f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} ({error}); start all of "
                "them with the same torchrun line"
            ) from error
    return World(distributed.get_rank(), distributed.get_world_size())
