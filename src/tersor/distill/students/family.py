"""Students of the teacher's architecture in smaller, with random weights.

How much width and depth a student may lose is a matter of trial; students far from the teacher learn less from it
(Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from tersor.distill.students.configured import configured, is_configured
from tersor.distill.students.sequential import sequential
from tersor.errors import ConfigError, ModelError


class Member(NamedTuple):
    """One of a family of students.

    Attributes:
        label: Such as `width 0.75, depth 0.5`.
        parameters: How many there are; those that are shared count once.
        build: Makes the student, a new one at each call.
    """

    label: str
    parameters: int
    build: Callable[[], nn.Module]


def scaled(teacher: nn.Module, *, width: float = 1.0, depth: float = 1.0, seed: int = 0) -> nn.Module:
    """The teacher's architecture at a share of its width and depth, with random weights.

    Hugging Face models are built from a changed configuration: fewer heads of the same size, a hidden and an inner size
    to match, fewer layers. Nests of `nn.Sequential` get fewer channels and fewer repeated layers; inputs and outputs
    stay. Sizes are rounded to what the architecture allows.

    ```python
    student = scaled(teacher, width=0.5, depth=0.5)
    ```

    Args:
        teacher: Stays as it is.
        width: Share of heads, channels and hidden features, in (0, 1].
        depth: Share of the repeated layers, in (0, 1].
        seed: Of the weights. The caller's random numbers stay as they are.

    Returns:
        A student with the teacher's device, type and mode, whose parameters take gradients.

    Raises:
        ConfigError: if a share is not in (0, 1], or so near to 1, or of so few, that nothing changes.
        ModelError: if the architecture is none of these, or cannot be built at this size.
    """
    build = _plan(teacher, width, depth)
    for name, share, alone in (("width", width, (width, 1.0)), ("depth", depth, (1.0, depth))):
        if share != 1 and _count(_plan(teacher, *alone)) == _count(_plan(teacher, 1.0, 1.0)):
            raise ConfigError(
                f"{name} {share:g} of {type(teacher).__name__} is the teacher itself: its heads, channels or repeated "
                f"layers are too few, or its configuration does not name them; leave {name} at 1 or take less"
            )
    return _built(teacher, build, seed)


def family(
    teacher: nn.Module,
    *,
    widths: Sequence[float] = (1.0, 0.75, 0.5),
    depths: Sequence[float] = (1.0, 0.5),
    seed: int = 0,
) -> list[Member]:
    """Students at every combination of widths and depths, largest first; nothing is built until one is asked for.

    ```python
    for label, parameters, build in family(teacher):
        ...
    ```

    Args:
        teacher: Stays as it is.
        widths: As in `scaled`.
        depths: As in `scaled`.
        seed: As in `scaled`.

    Returns:
        Members of different sizes: of those that round to the same, the first.

    Raises:
        ConfigError: if a share is not in (0, 1], or there is none.
        ModelError: as in `scaled`.
    """
    if not widths or not depths:
        raise ConfigError("widths, depths: expected at least one share of each")
    members: dict[int, Member] = {}
    for width in widths:
        for depth in depths:
            plan = _plan(teacher, width, depth)
            parameters = _count(plan)
            build = _later(teacher, plan, seed)
            members.setdefault(parameters, Member(f"width {width:g}, depth {depth:g}", parameters, build))
    return sorted(members.values(), key=lambda member: -member.parameters)


def _later(teacher: nn.Module, plan: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    return lambda: _built(teacher, plan, seed)


def _plan(teacher: nn.Module, width: float, depth: float) -> Callable[[], nn.Module]:
    for name, share in (("width", width), ("depth", depth)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name}: expected a share in (0, 1], got {share}")
    if is_configured(teacher):
        return configured(teacher, width, depth)
    if type(teacher) is nn.Sequential:
        return sequential(teacher, width, depth)
    inner = next((path for path, module in teacher.named_modules() if path and is_configured(module)), None)
    if inner is not None:
        raise ModelError(
            f"{type(teacher).__name__} wraps a Hugging Face model, {inner!r}, and only its own code knows what fits "
            f"around it; scale teacher.{inner} and wrap it again, or take layers of the teacher with every_kth"
        )
    raise ModelError(
        f"{type(teacher).__name__}: expected a Hugging Face model or a nest of nn.Sequential, which can be built anew "
        "in smaller; write the student as a module of your own, prune the teacher, or take layers of it with every_kth"
    )


def _count(plan: Callable[[], nn.Module]) -> int:
    """Parameters of what a plan builds, on the meta device: without memory, and without random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(parameter.numel() for parameter in plan().parameters())


def _built(teacher: nn.Module, plan: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = plan()
    like = next((tensor for tensor in teacher.parameters() if tensor.is_floating_point()), torch.empty(0))
    return student.to(like.device, like.dtype).train(teacher.training).requires_grad_(True)
