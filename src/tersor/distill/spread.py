"""Teachers that do not fit into one device: their weights are spread over the processes that train together.

`sharded`: each process collects a block's weights while it computes with them (FSDP, Zhao et al. 2023,
https://arxiv.org/abs/2304.11277). `tensor`: each computes its part of every matrix product (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053). `pipeline`: each computes some of the layers (Huang et al. 2019,
https://arxiv.org/abs/1811.06965); micro-batches are the batches of the processes.

Every process must call the teacher equally often. Shapes: `B` batch, of each process its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from tersor.distill.exchange import Stages, take_turns
from tersor.errors import ConfigError
from tersor.train.parallel import World, join
from tersor.train.sharded import shard

How = Literal["sharded", "tensor", "pipeline"]
Split = Literal["colwise", "rowwise"]

ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Dropout, nn.Identity)


def spread(
    teacher: nn.Module,
    how: How = "sharded",
    *,
    device: torch.device | str | None = None,
    plan: Mapping[str, Split] | None = None,
) -> nn.Module:
    """A copy of the teacher that answers like it, without gradients, of which each process holds a part.

    `tensor` splits every `nn.Linear` and `nn.Embedding` whose outputs divide by the number of processes and collects
    its outputs, which is right for any model. In an `nn.Sequential`, two linear layers with nothing but elementwise
    functions between them exchange once: the first is split by outputs and stays split, the second by inputs.
    `pipeline` takes an `nn.Sequential`, also a nested one, whose layers hand on one tensor.

    Args:
        teacher: Stays as it is.
        how: See the module.
        device: Where to compute, e.g. `cuda` for this process's GPU; None for where the teacher is.
        plan: For `tensor`: patterns of paths (`*.attention.query`) of linear layers that stay split by outputs
            (`colwise`) or are split by inputs (`rowwise`) because one that stays split stands before. The code between
            must work on a part of the features: heads, for instance, must be counted by their size.

    Returns:
        In one process a plain copy.

    Raises:
        ConfigError: if the teacher cannot be spread in that way.
        DistributedError: if the other processes cannot be reached.
    """
    if how not in get_args(How):
        raise ConfigError(f"how: expected one of {list(get_args(How))}, got {how!r}")
    if plan is not None and how != "tensor":
        raise ConfigError(f"plan: belongs to how='tensor', not to {how!r}")
    first = next(itertools.chain(teacher.parameters(), teacher.buffers()), torch.empty(0))
    world = join(_device(first.device if device is None else device))
    own = copy.deepcopy(teacher).eval().requires_grad_(False)
    if world.size == 1:
        return own.to(world.device)
    if how == "sharded":
        shard(own, world, keep_root=False)
        return Spread(own.to(world.device), world)
    if how == "tensor":
        _split(own, world, plan or {})
        return Turns(own.to(world.device), world)
    return Pipeline(own, world)


def held_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers that this process holds."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


class Spread(nn.Module):
    """A teacher of which each process holds a part; each asks about its own batch."""

    def __init__(self, module: nn.Module, world: World) -> None:
        super().__init__()
        self.module, self.world = module, world
        self.eval()  # who trains with a teacher in evaluation mode takes it as it is, and no copy

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the teacher answers."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Spread:
        """A teacher stays in evaluation mode."""
        return super().train(False)


class Turns(Spread):
    """All processes compute the answer to each one's batch together, one batch after the other."""

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the teacher answers."""
        answer = None
        for asking, (given, named) in enumerate(take_turns((args, kwargs), self.world)):
            found = self.module(*given, **named)
            if asking == self.world.rank:
                answer = found
        return answer


class Pipeline(Spread):
    """Each process has some consecutive layers; batches move on from one to the next."""

    def __init__(self, teacher: nn.Module, world: World) -> None:
        layers = _layers(teacher)
        if len(layers) < world.size:
            raise ConfigError(
                f"how='pipeline': expected an nn.Sequential of at least {world.size} layers, one for each process, got "
                f"{type(teacher).__name__} with {len(layers)}; use how='sharded', which takes any model"
            )
        super().__init__(nn.Sequential(*_part(layers, world)).to(world.device), world)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`[B, ...]` -> what the teacher answers."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ConfigError(
                f"how='pipeline' takes one tensor, got {len(args)} values and {sorted(kwargs)}; use how='sharded'"
            )
        return Stages(self.world).run(self.module, args[0])


def _device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _split(module: nn.Module, world: World, plan: Mapping[str, Split]) -> None:
    """Splits the layers in place."""
    styles: dict[str, ParallelStyle] = {}
    for path, layer in module.named_modules():
        if _divides(layer, world) and not _used_directly(module, path):
            styles[path] = ColwiseParallel(output_layouts=Replicate())
    styles |= _pairs(module, world)
    for pattern, split in plan.items():
        found = [
            path for path, layer in module.named_modules() if type(layer) is nn.Linear and fnmatchcase(path, pattern)
        ]
        if not found or split not in get_args(Split):
            raise ConfigError(
                f"plan: expected patterns of paths of nn.Linear layers with one of {list(get_args(Split))}, got "
                f"{pattern!r}: {split!r}, which fits {len(found)} layers"
            )
        for path in found:
            layer = module.get_submodule(path)
            features = layer.out_features if split == "colwise" else layer.in_features
            if features % world.size:  # type: ignore[operator]
                raise ConfigError(f"plan: {path!r} has {features} features, which {world.size} processes cannot share")
            styles[path] = ColwiseParallel() if split == "colwise" else RowwiseParallel()
    if not styles:
        raise ConfigError(
            f"how='tensor': no linear layer or embedding of {type(module).__name__} can be split over {world.size} "
            "processes; use how='sharded'"
        )
    parallelize_module(module, init_device_mesh(world.device.type, (world.size,)), styles)


def _divides(layer: nn.Module, world: World) -> bool:
    if type(layer) is nn.Linear:
        return layer.out_features % world.size == 0
    # A sparse or renormalising embedding is looked up in another way.
    return type(layer) is nn.Embedding and layer.embedding_dim % world.size == 0 and layer.max_norm is None


def _used_directly(module: nn.Module, path: str) -> bool:
    """Whether PyTorch's own attention or encoder reads the layer's weight without calling it."""
    parents = [".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1)]
    direct = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return any(isinstance(module.get_submodule(parent), direct) for parent in parents)


def _pairs(module: nn.Module, world: World) -> dict[str, ParallelStyle]:
    """Styles of linear layers of an `nn.Sequential` that need not exchange what is between them."""
    styles: dict[str, ParallelStyle] = {}
    for path, container in module.named_modules():
        if type(container) is not nn.Sequential:
            continue
        waiting: str | None = None
        for name, layer in container.named_children():
            place = f"{path}.{name}" if path else name
            if type(layer) is nn.Linear:
                if waiting is not None:
                    styles |= {waiting: ColwiseParallel(), place: RowwiseParallel()}
                    waiting = None
                else:
                    waiting = place if _divides(layer, world) else None
            elif not isinstance(layer, ELEMENTWISE):
                waiting = None
    return styles


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of nested `nn.Sequential`s, in order."""
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in _layers(child)]


def _part(layers: list[nn.Module], world: World) -> list[nn.Module]:
    """This process's layers: consecutive, of about equal weight, at least one each."""
    sizes = [held_bytes(layer) for layer in layers]
    cuts = [0]
    for stage in range(1, world.size):
        goal = sum(sizes) * stage / world.size
        lowest, highest = cuts[-1] + 1, len(layers) - (world.size - stage)
        cuts.append(min(range(lowest, highest + 1), key=lambda cut, goal=goal: abs(sum(sizes[:cut]) - goal)))  # type: ignore[misc]
    cuts.append(len(layers))
    return layers[cuts[world.rank] : cuts[world.rank + 1]]
