"""Where and how a training computes: device, memory layout, compilation; undone at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        tensor = next((tensor for tensor in [*module.parameters(), *module.buffers()]), torch.empty(0))
        device = tensor.device
    else:
        try:
            device = torch.device(schedule.device)
        except RuntimeError:
            raise ConfigError(
                f"Schedule.device: expected a device such as cpu or cuda, got {schedule.device!r}"
            ) from None
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # one process for each
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("Schedule.device: cuda is not available here; leave device out to train on the processor")
    if schedule.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"Schedule.precision: float16 trains on CUDA only, not on {device.type}; use bfloat16")
    return device


@contextmanager
def placed(modules: Sequence[nn.Module], schedule: Schedule, device: torch.device) -> Iterator[None]:
    """Inside, the modules are on the device and in the layout; the first one is compiled. Afterwards, as before."""
    before = [next((p.device for p in module.parameters()), torch.device("cpu")) for module in modules]
    for module in modules:
        module.to(device)
        if schedule.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        if schedule.compile:
            modules[0].compile()
        yield
    finally:
        if schedule.compile:
            modules[0]._compiled_call_impl = None
        for module, home in zip(modules, before, strict=True):
            if schedule.channels_last:
                module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            module.to(home)


def moved(batch: Batch, schedule: Schedule, device: torch.device) -> Batch:
    """The batch on the device, images in the layout of the model."""

    def move(value: Tensor) -> Tensor:
        value = value.to(device, non_blocking=True)
        if schedule.channels_last and value.ndim == IMAGES:
            value = value.contiguous(memory_format=torch.channels_last)
        return value

    return batch.map(move)
