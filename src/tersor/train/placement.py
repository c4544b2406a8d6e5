"""Where and how a training computes: device, memory layout, compilation; undone at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import ConfigError
from tersor.train.schedule import Schedule

IMAGES = 4  # dimensions of a batch of images


def device_of(module: nn.Module, schedule: Schedule) -> torch.device:
    """The device to train on.

    Raises:
        ConfigError: if it is not there, or has no kernels for the precision.
    """
    if schedule.device is None:
        device = _home(module)
    else:
        try:
            device = torch.device(schedule.device)
        except RuntimeError:
            raise ConfigError(
                f"Schedule.device: expected a device such as cpu or cuda, got {schedule.device!r}"
            ) from None
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # one process for each
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to be missing
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Schedule.device: {device} is not available here ({reason}); leave device out to train where the model is"
        ) from None
    if device.type == "meta":
        raise ConfigError("Schedule.device: nothing can be computed on meta; give the model real weights first")
    if schedule.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"Schedule.precision: float16 trains on CUDA only, not on {device.type}; use bfloat16")
    return device


@contextmanager
def placed(modules: Sequence[nn.Module], schedule: Schedule, device: torch.device) -> Iterator[None]:
    """Inside, the modules are on the device and in the layout; the first one is compiled. Afterwards, as before."""
    homes = [_home(module) for module in modules]
    compiled = modules[0]._compiled_call_impl
    strides: dict[nn.Parameter, tuple[int, ...]] = {}
    try:
        for module in modules:
            module.to(device)
            if schedule.channels_last:
                strides |= _channels_last(module)
        if schedule.compile:
            modules[0].compile()
        yield
    finally:
        modules[0]._compiled_call_impl = compiled
        for parameter, stride in strides.items():
            before = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
            parameter.data = before.copy_(parameter.detach())
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def _channels_last(module: nn.Module) -> dict[nn.Parameter, tuple[int, ...]]:
    """Lays out the weights of two-dimensional convolutions anew; the strides that they had."""
    strides = {}
    for parameter in module.parameters():
        if parameter.ndim == IMAGES:
            strides[parameter] = parameter.stride()
            parameter.data = parameter.detach().contiguous(memory_format=torch.channels_last)
    return strides


def _home(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def arithmetic(schedule: Schedule, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, the forward pass computes in the schedule's precision."""
    if schedule.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, schedule.precision))


def moved(batch: Batch, schedule: Schedule, device: torch.device) -> Batch:
    """The batch on the device, images in the layout of the model."""

    def move(value: Tensor) -> Tensor:
        value = value.to(device, non_blocking=True)
        if schedule.channels_last and value.ndim == IMAGES:
            value = value.contiguous(memory_format=torch.channels_last)
        return value

    return batch.map(move)
