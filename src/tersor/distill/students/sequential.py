"""Smaller copies of networks that are a nest of `nn.Sequential`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from math import gcd

from torch import nn

from tersor.distill.students.sizes import rounded, share
from tersor.errors import ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PARAMETRISED = (*WEIGHTED, *BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
WITHOUT_PARAMETERS = ("activation", "dropout", "padding", "pooling", "upsampling")
KEEP_SIZE = (*PARAMETRISED, nn.Flatten, nn.Identity)
SUPPORTED = "Conv, Linear, BatchNorm, GroupNorm, LayerNorm, activations, dropout, pooling, Flatten"


def sequential(teacher: nn.Sequential, width: float, depth: float) -> Callable[[], nn.Module]:
    """Builds the same network with narrower inner layers and fewer repeated ones.

    Input channels and outputs stay. Neighbours are repeated if they look the same, one by one or several in turn
    (convolution, normalisation, activation), and keep the size of what goes through.

    Raises:
        ModelError: if a layer is not one of those that are known.
    """
    leaves = [(path, module) for path, module in teacher.named_modules() if path and type(module) is not nn.Sequential]
    for path, module in leaves:
        if not _known(module):
            raise ModelError(
                f"{path!r} is {type(module).__name__}; a nest of nn.Sequential scales if it is made of {SUPPORTED}. "
                "Write the student as a module of your own, prune the teacher, or take blocks of it with every_kth"
            )
    short = _shortened(teacher, depth) if depth != 1 else teacher
    weighted = [module for module in short.modules() if isinstance(module, WEIGHTED)]
    if not weighted:
        raise ModelError(f"{type(teacher).__name__} has no layer with weights that could be scaled")

    def build() -> nn.Module:
        return _Builder(width, weighted[-1]).network(short)

    return build


def _known(module: nn.Module) -> bool:
    if type(module) in PARAMETRISED:
        return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
    kind = type(module).__module__.rpartition("torch.nn.modules.")[2]
    plain = next(module.parameters(), None) is None and not isinstance(module, nn.GLU)
    return plain and (type(module) in KEEP_SIZE or kind in WITHOUT_PARAMETERS)


class _Builder:
    """Walks along the network and remembers how many channels arrive: of the teacher's, and of the new one's."""

    def __init__(self, width: float, last: nn.Module) -> None:
        self.width, self.last = width, last
        self.before, self.now = 0, 0  # none counted yet: what is fed in stays as it is

    def network(self, teacher: nn.Sequential) -> nn.Sequential:
        named = teacher._modules.items()
        return nn.Sequential(
            OrderedDict(
                (name, self.network(child) if isinstance(child, nn.Sequential) else self.layer(child))
                for name, child in named
                if child is not None
            )
        )

    def layer(self, old: nn.Module) -> nn.Module:
        if isinstance(old, CONVOLUTIONS):
            return self.convolution(old)
        if isinstance(old, nn.Linear):
            arriving = self.arriving(old, old.in_features)
            self.before, self.now = old.out_features, self.leaving(old, old.out_features)
            return nn.Linear(arriving, self.now, bias=old.bias is not None)
        if isinstance(old, BATCH_NORMS):
            return type(old)(
                self.arriving(old, old.num_features), old.eps, old.momentum, old.affine, old.track_running_stats
            )
        if isinstance(old, nn.GroupNorm):
            channels = self.arriving(old, old.num_channels)
            return nn.GroupNorm(gcd(old.num_groups, channels), channels, old.eps, old.affine)
        if isinstance(old, nn.LayerNorm):
            size = self.arriving(old, old.normalized_shape[0])
            return nn.LayerNorm(size, old.eps, old.elementwise_affine, old.bias is not None)
        if isinstance(old, nn.PReLU):
            return nn.PReLU(1 if old.num_parameters == 1 else self.arriving(old, old.num_parameters))
        return copy.deepcopy(old)

    def convolution(self, old: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Module:
        arriving = self.arriving(old, old.in_channels)
        groups, leaving = old.groups, self.leaving(old, old.out_channels)
        if groups > 1:
            if groups != old.in_channels:
                raise ModelError(
                    f"{old} has groups of several channels; only one group, or one per channel, can be scaled. Write "
                    "the student as a module of your own, or prune the teacher"
                )
            groups, leaving = arriving, arriving * (old.out_channels // old.in_channels)
            if old is self.last and leaving != old.out_channels:
                raise ModelError(f"{old} is the last layer, and its outputs cannot stay if its inputs become fewer")
        self.before, self.now = old.out_channels, leaving
        return type(old)(
            arriving,
            leaving,
            old.kernel_size,  # type: ignore[arg-type]  # one tuple type for each of the three classes
            stride=old.stride,  # type: ignore[arg-type]
            padding=old.padding,  # type: ignore[arg-type]
            dilation=old.dilation,  # type: ignore[arg-type]
            groups=groups,
            bias=old.bias is not None,
            padding_mode=old.padding_mode,
        )

    def arriving(self, old: nn.Module, features: int) -> int:
        """New number of features where the teacher has `features`: behind a Flatten a multiple of the channels."""
        if not self.before:
            return features
        if features % self.before:
            raise ModelError(f"{old} takes {features} features, but {self.before} channels arrive there")
        return features // self.before * self.now

    def leaving(self, old: nn.Module, features: int) -> int:
        return features if old is self.last else rounded(features, self.width)


def _shortened(network: nn.Sequential, depth: float) -> nn.Sequential:
    """The network without some of its repeated parts; layers are those of the original."""
    names, children = list(network._modules), list(network)
    looks = [repr(child) for child in children]
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    position = 0
    while position < len(children):
        period, times = _repetition(looks, children, position)
        stays = share(times, depth) if times > 1 else 1
        for index in range(position, position + period * stays):
            child = children[index]
            inner = times == 1 and isinstance(child, nn.Sequential)
            kept[names[index]] = _shortened(child, depth) if inner else child  # type: ignore[arg-type]
        position += period * times
    return nn.Sequential(kept)


def _repetition(looks: list[str], children: list[nn.Module], start: int) -> tuple[int, int]:
    """Period and number of the repetition from `start` on that covers most; (1, 1) if there is none."""
    best = (1, 1)
    for period in range(1, (len(looks) - start) // 2 + 1):
        unit, times = looks[start : start + period], 1
        while looks[start + times * period : start + (times + 1) * period] == unit:
            times += 1
        if times > 1 and period * times > best[0] * best[1] and _can_go(children[start : start + period]):
            best = (period, times)
    return best


def _can_go(unit: list[nn.Module]) -> bool:
    leaves = [leaf for module in unit for leaf in module.modules() if type(leaf) is not nn.Sequential]
    return any(isinstance(leaf, WEIGHTED) for leaf in leaves) and all(_keeps_size(leaf) for leaf in leaves)


def _keeps_size(layer: nn.Module) -> bool:
    if isinstance(layer, CONVOLUTIONS):
        if set(layer.stride) != {1}:
            return False
        if isinstance(layer.padding, str):
            return layer.padding == "same"
        spans = zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
        return all(2 * pad == by * (size - 1) for pad, size, by in spans)
    kind = type(layer).__module__.rpartition(".")[2]
    return isinstance(layer, KEEP_SIZE) or kind in ("activation", "dropout")
