"""The processes that train together: `torchrun` starts them and sets the environment that `join` reads.

Each takes its share of every batch. Their weights are the same after every step, and so is whatever the loop calls.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from tersor.errors import ConfigError, DistributedError

LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo", "socket")
MESSAGE = 1 << 24  # numbers that are broadcast at once


@dataclass(frozen=True)
class World:
    """The processes that train together: this one's number, how many there are, and where they compute."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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

    def agree(self, what: str, facts: object) -> None:
        """Raises `ConfigError` in every process if `facts` differ between them."""
        if self.size == 1:
            return
        number = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "little")
        extremes = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
        if extremes[0] == -extremes[1]:
            return
        every = [repr(item) for item in self.gathered(facts)]
        other = next(rank for rank, item in enumerate(every) if item != every[0])
        first = next((i for i, (a, b) in enumerate(zip(every[0], every[other], strict=False)) if a != b), 0)
        shown = [item[max(0, first - 40) : first + 40] for item in (every[0], every[other])]
        raise ConfigError(
            f"all processes must train the same thing, but {what} differs: process 0 of {self.size} has …{shown[0]}…, "
            f"process {other} has …{shown[1]}…"
        )

    def mean(self, values: Sequence[float]) -> list[float]:
        """The means over all processes."""
        if self.size == 1:
            return list(values)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=kind, device=self.device)
        distributed.all_reduce(tensor)
        return (tensor / self.size).tolist()

    def gathered(self, item: Any) -> list[Any]:
        """The item of every process, in order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    @torch.no_grad()
    def from_leader(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with those of the first process, in place, many small ones in one message."""
        if self.size == 1:
            return
        for message in _messages([*tensors]):
            together = torch.cat([tensor.detach().reshape(-1) for tensor in message]).to(self.device)
            distributed.broadcast(together, src=0)
            parts = torch.split(together, [tensor.numel() for tensor in message])
            for tensor, part in zip(message, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the loss of another process into a `DistributedError`."""
        if self.size == 1:
            yield
            return
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, warnings.catch_warnings():
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

    A group of processes that is made here ends with the program; the caller's own is left alone.

    Raises:
        DistributedError: if the other processes cannot be reached.
    """
    if not distributed.is_available():
        return World(device=device)
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World(device=device)
        try:
            store, rank, size = next(rendezvous("env://"))
            store = distributed_c10d.PrefixStore(_attempt(), store)
            kind = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(kind, store=store, rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"expected to meet {os.environ['WORLD_SIZE']} processes at "
                f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} ({error}); start all of "
                "them with the same torchrun line"
            ) from error
        atexit.register(_leave)
    return World(distributed.get_rank(), distributed.get_world_size(), device)


def refuse_several(what: str) -> None:
    """Raises `ConfigError` if several processes do `what`, which is one process's work."""
    joined = distributed.is_available() and distributed.is_initialized()
    size = distributed.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ConfigError(
            f"{what} is the work of one process, but {size} were started; train with tersor.train.fit or "
            "tersor.distill.train under torchrun, save what the first process has, and go on without torchrun"
        )


def _attempt() -> str:
    """Keeps processes that `torchrun --max-restarts` started again from the addresses of those that are gone.

    On several machines the count may differ between them, so it is not used there.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else '0'}"


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one number format, each of at most `MESSAGE` numbers or a single tensor."""
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        message: list[Tensor] = []
        for tensor in tensors:
            if tensor.dtype != kind:
                continue
            if message and sum(map(Tensor.numel, message)) + tensor.numel() > MESSAGE:
                yield message
                message = []
            message.append(tensor)
        yield message
