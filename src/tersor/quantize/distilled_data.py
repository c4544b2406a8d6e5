"""Calibration data out of nothing: inputs for which every BatchNorm sees the statistics that it was trained on.

``min_x Σ_l ‖μ_l(x) − μ_l‖² + ‖σ_l(x) − σ_l‖²``, from noise. Cai et al. 2020 (ZeroQ), https://arxiv.org/abs/2001.00281.

Shapes: `B` inputs of a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.batch import Batch
from tersor.errors import UnsupportedError

STEPS = 100
LEARNING_RATE = 0.1


def distilled_batches(
    model: nn.Module, example: Batch, count: int, *, batch_size: int = 50, steps: int = STEPS, seed: int = 0
) -> list[Batch]:
    """Makes `count` inputs for a model that knows its data by its BatchNorms alone.

    Args:
        model: Stays as it is.
        example: Tells the inputs' shape; its values are not looked at.
        count: How many inputs.
        batch_size: How many are made at a time, at least 2.
        steps: Of Adam, for each batch.
        seed: Fixes the noise.

    Raises:
        UnsupportedError: if the model has no BatchNorm with statistics, or other inputs than one float tensor.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    tensors = list(example.tensors().values())
    if not norms or len(tensors) != 1 or not tensors[0].is_floating_point():
        raise UnsupportedError(
            f"calibration data can only be distilled from a model with BatchNorm and a single float input; "
            f"{type(model).__name__} has {len(norms)} BatchNorms and {len(tensors)} inputs. Give real examples: "
            "Task(calibrate=...)"
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, count, batch_size):
        size = max(2, min(batch_size, count - start))
        noise = torch.randn((size, *tensors[0].shape[1:]), generator=generator)
        made = _descend(frozen, noise, example, steps)
        found.append(_like(example, made[: min(batch_size, count - start)]))
    return found


def _descend(model: nn.Module, values: Tensor, example: Batch, steps: int) -> Tensor:
    values = values.requires_grad_()
    optimizer = torch.optim.Adam([values], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    distances: list[Tensor] = []

    def watch(norm: nn.Module, args: tuple[Any, ...]) -> None:
        seen = args[0].movedim(1, 0).flatten(1)
        mean, variance = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor)  # noqa: S101 - checked by the caller
        assert isinstance(variance, Tensor)  # noqa: S101 - BatchNorm has both or none
        spread, wanted = seen.std(1, correction=0), variance.sqrt()
        distances.append(((seen.mean(1) - mean).square() + (spread - wanted).square()).mean() / variance.mean())

    handles = [norm.register_forward_pre_hook(watch) for norm in _norms(model)]
    try:
        with torch.enable_grad():
            for _ in range(steps):
                distances.clear()
                _like(example, values).call(model)
                optimizer.zero_grad()
                torch.stack(distances).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    finally:
        for handle in handles:
            handle.remove()
    return values.detach()


def _norms(model: nn.Module) -> list[nn.Module]:
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in found if norm.running_mean is not None]


def _like(example: Batch, values: Tensor) -> Batch:
    """A batch with these values, passed as the example's are."""
    if example.args:
        return Batch((values,), {}, None)
    return Batch((), {name: values for name in example.kwargs}, None)
