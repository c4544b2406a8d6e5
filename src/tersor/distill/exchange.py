"""Handing batches and answers from one process to another.

Written with plain messages: `torch.distributed.pipelining` wants batches of one size and a schedule with losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from tersor.train.parallel import World

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
HEAD = 10  # numbers that describe a tensor: its format, its dimensions, their sizes


def take_turns(values: Any, world: World) -> Iterator[Any]:
    """The values of every process in order, tensors in tuples, lists and mappings included, the same everywhere."""
    for asking in range(world.size):
        tensors: list[Tensor] = []
        described = _mapped(values, lambda tensor, kept=tensors: _described(tensor, kept))  # type: ignore[misc]
        box = [described if asking == world.rank else None]
        distributed.broadcast_object_list(box, src=asking, device=world.device)
        if asking != world.rank:
            tensors = []
            _mapped(box[0], lambda tensor, kept=tensors: _described(tensor, kept))  # type: ignore[misc]
            tensors = [torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device) for tensor in tensors]
        received = [tensor.to(world.device).contiguous() for tensor in tensors]
        for tensor in received:
            distributed.broadcast(tensor, src=asking)
        rest = iter(received)
        yield _mapped(box[0], lambda tensor, rest=rest: next(rest))  # type: ignore[misc]


class Stages:
    """Batches that pass from process to process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._sent: list[tuple[distributed.Work | None, Tensor]] = []  # tensors must live until they are gone

    def run(self, stage: nn.Module, batch: Tensor) -> Tensor:
        """This process's layers on every process's batch; the answer to its own `batch`."""
        rank, last = self.world.rank, self.world.size - 1
        if rank:
            self._send(batch, 0)
        answer: Tensor | None = None
        for asking in range(self.world.size):
            own = rank == 0 and asking == 0
            received = batch if own else self._receive(rank - 1 if rank else asking)
            computed = stage(received.to(self.world.device))
            if rank < last:
                self._send(computed, rank + 1)
            elif asking == last:
                answer = computed
            else:
                self._send(computed, asking)
        if answer is None:
            answer = self._receive(last)
        for work, _ in self._sent:
            if work is not None:
                work.wait()
        return answer

    def _send(self, tensor: Tensor, to: int) -> None:
        shape = [KINDS.index(tensor.dtype), tensor.ndim, *tensor.shape]
        head = torch.tensor(shape + [0] * (HEAD - len(shape)), dtype=torch.int64, device=self.world.device)
        for part in (head, tensor.to(self.world.device).contiguous()):
            self._sent.append((distributed.isend(part, to), part))

    def _receive(self, source: int) -> Tensor:
        head = torch.empty(HEAD, dtype=torch.int64, device=self.world.device)
        distributed.recv(head, source)
        kind, dimensions, *sizes = (int(number) for number in head.tolist())
        tensor = torch.empty(sizes[:dimensions], dtype=KINDS[kind], device=self.world.device)
        distributed.recv(tensor, source)
        return tensor


def _described(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    kept.append(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return cast("Any", type(value))(_mapped(item, change) for item in value)
    return value
