"""Training with weights, gradients and optimizer state shared out over the processes.

Each process holds its part of every parameter (split along the first dimension) and collects a block's parameters only
while the block computes: FSDP, Zhao et al. 2023, https://arxiv.org/abs/2304.11277; ZeRO, Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054. The modules are changed in place while they train, because losses and hooks know
them; afterwards they are what they were, with the trained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state as composed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from tersor.errors import ConfigError
from tersor.train.parallel import World
from tersor.train.schedule import Schedule
from tersor.train.strategy import Strategy


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the children of the `ModuleList` or `Sequential` whose equal children weigh most."""
    best: list[nn.Module] = []
    weight = 0
    for container in module.modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        children = list(container)
        for kind in {type(child) for child in children}:
            same = [child for child in children if type(child) is kind]
            numbers = sum(parameter.numel() for child in same for parameter in child.parameters())
            if len(same) > 1 and numbers > weight:
                best, weight = same, numbers
    return best


def shard(module: nn.Module, world: World, *, keep_root: bool) -> None:
    """Shares out the parameters of every repeated block and of the rest, in place.

    Args:
        module: Changed.
        world: More than one process.
        keep_root: Whether the parameters outside of the blocks stay collected between forward and backward pass.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_root)


@dataclass
class _Look:
    """What `fully_shard` changes in a module."""

    kind: type[nn.Module]
    hooks: dict[str, Any]
    extras: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]

    @classmethod
    def of(cls, module: nn.Module, known: set[str]) -> _Look:
        """How the module looks now; attributes beside the `known` ones are extras."""
        hooks = {name: value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
        extras = {name: value for name, value in vars(module).items() if name not in known}
        return cls(type(module), hooks, extras, dict(module._parameters))

    def put(self, module: nn.Module, other: _Look) -> None:
        """Gives the module this look in the place of the other one."""
        module.__class__ = self.kind
        for name in other.extras:
            vars(module).pop(name, None)
        vars(module).update(self.extras)
        vars(module).update(self.hooks)
        module._parameters.update(self.parameters)


class Sharded(Strategy):
    """Each process holds its part of all weights (`parallel: sharded`).

    Raises:
        ConfigError: if the schedule asks for what does not go together with it.
    """

    def __init__(self, world: World, schedule: Schedule) -> None:
        super().__init__(world)
        asked = {
            "compile": schedule.compile,
            "channels_last": schedule.channels_last,
            "precision: float16": schedule.precision == "float16",
        }
        if any(asked.values()):
            raise ConfigError(
                f"Schedule.parallel: sharded does not go together with {[name for name in asked if asked[name]]}; "
                "leave them out (precision: bfloat16 works), or train with parallel: data"
            )
        self._modules: list[tuple[nn.Module, _Look, _Look]] = []
        self._pairs: list[tuple[nn.Parameter, DTensor]] = []

    @contextmanager
    def spread(self, objective: nn.Module) -> Iterator[nn.Module]:
        """The objective itself, its parameters shared out; after an error the module has the weights of the start."""
        scalars = [name for name, parameter in objective.named_parameters() if not parameter.ndim]
        if scalars:
            raise ConfigError(
                f"Schedule.parallel: sharded cannot split single numbers, but {scalars} are such parameters; give them "
                "the shape [1], or train with parallel: data"
            )
        modules = list(objective.modules())
        known = [set(vars(module)) for module in modules]
        plain = [_Look.of(module, names) for module, names in zip(modules, known, strict=True)]
        for module, look in zip(modules, plain, strict=True):
            # Handles of hooks know the dict that they are in: the module's own must stay as it is.
            vars(module).update({name: value.copy() for name, value in look.hooks.items()})
        shard(objective, self.world, keep_root=True)
        shared = [_Look.of(module, names) for module, names in zip(modules, known, strict=True)]
        self._modules = list(zip(modules, plain, shared, strict=True))
        pairs: dict[int, tuple[nn.Parameter, DTensor]] = {}
        for before, after in zip(plain, shared, strict=True):
            for name, parameter in before.parameters.items():
                part: Any = after.parameters[name]
                if parameter is not None and isinstance(part, DTensor):
                    pairs[id(parameter)] = parameter, part
        self._pairs = list(pairs.values())
        for parameter, _ in self._pairs:
            parameter.data = parameter.data.cpu()
        trained = False
        try:
            yield objective
            trained = True
        finally:
            if trained:
                self._collect()
            self._dress(sharded=False)
            for module in modules:
                composed._module_state_mapping.pop(module, None)  # or it could not be shared out a second time
            self._modules, self._pairs = [], []

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Collects all parameters; afterwards each process keeps its part of what they have become."""
        start = [parameter.data for parameter, _ in self._pairs]
        self._collect()
        self._dress(sharded=False)
        try:
            yield
            self._share_out()
        finally:
            for (parameter, _), data in zip(self._pairs, start, strict=True):
                parameter.data = data
            self._dress(sharded=True)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, as one process would have it; the leader alone keeps it."""
        return {**optimizer.state_dict(), "state": self._each(optimizer, self._full)}

    def load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Each process keeps its part."""
        optimizer.load_state_dict({**state, "state": {}})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, entries in state["state"].items():
            parameter = parameters[index]
            optimizer.state[parameter] = {name: _part_of(value, parameter) for name, value in entries.items()}

    def _each(self, optimizer: Optimizer, change: Callable[[Any], Any]) -> dict[int, dict[str, Any]]:
        state = optimizer.state_dict()["state"]
        return {index: {name: change(value) for name, value in entries.items()} for index, entries in state.items()}

    def _full(self, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if self.world.leads else None

    @torch.no_grad()
    def _collect(self) -> None:
        for parameter, part in self._pairs:
            parameter.data = part.full_tensor().detach().clone()

    @torch.no_grad()
    def _share_out(self) -> None:
        for parameter, part in self._pairs:
            if parameter.requires_grad != part.requires_grad:
                raise ConfigError(
                    "Schedule.parallel: sharded needs to know what trains from the start, but a hook changed "
                    f"requires_grad of a parameter of shape {tuple(parameter.shape)}; train with parallel: data"
                )
            part.to_local().copy_(_part_of(parameter.detach(), part).to_local())

    def _dress(self, *, sharded: bool) -> None:
        for module, plain, shared in self._modules:
            if sharded:
                shared.put(module, plain)
            else:
                plain.put(module, shared)


def _part_of(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor that is shaped like a shared parameter; other values stay."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    whole = value.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
