"""How the weights are held while they train: as they are, or the same in every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tersor.train.parallel import World

NAMES = signature(DistributedDataParallel).parameters
EQUAL_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMES else "broadcast_buffers"  # before 2.13


class Strategy:
    """One process that holds everything; what is said here holds for the others as well."""

    def __init__(self, world: World) -> None:
        self.world = world

    @contextmanager
    def spread(self, objective: nn.Module) -> Iterator[nn.Module]:
        """Inside, what comes back trains in the place of `objective`; afterwards that has all trained weights."""
        yield objective

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients add up and need not be exchanged yet."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the modules have plain and whole parameters that may be read and changed.

        Every process must get here, and change them in the same way.
        """
        return nullcontext()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint keeps of the optimizer, whatever the strategy; called in every process."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Takes up what `optimizer_state` gave."""
        optimizer.load_state_dict(state)


class Replicated(Strategy):
    """Every process holds all weights; gradients are averaged over the processes (`parallel: data`)."""

    @contextmanager
    def spread(self, objective: nn.Module) -> Iterator[nn.Module]:
        """The objective, averaging its gradients."""
        if not any(parameter.requires_grad for parameter in objective.parameters()):
            yield objective
            return
        # Losses on features leave a head without gradients, so unused parameters are nothing unusual here. Buffers
        # are made equal by the loop, after every step.
        options: dict[str, Any] = {EQUAL_BUFFERS: False}
        yield DistributedDataParallel(objective, find_unused_parameters=True, **options)

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients of a wrapped module add up and are not yet exchanged."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
