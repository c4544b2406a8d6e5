"""Keep-masks on models in training: `parameter path -> boolean mask of its shape`, True where kept.

Masked weights are plain zeros in the parameters themselves: a `state_dict` carries them as it is, and
`from_zeros` finds the masks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tersor.core.candidate import apply_masks
from tersor.errors import ModelError


def hold(model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer) -> RemovableHandle:
    """Zeroes the masked entries now and after every step of `optimizer`, whatever its momentum would do to them.

    Changes `model`. The mapping is read at every step: masks that change in it hold from the next step on. Call
    `remove()` on what comes back, or use it in a `with`, to let go.
    """
    apply_masks(model, masks)

    def again(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        apply_masks(model, masks)

    return optimizer.register_step_post_hook(again)


def check(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raises `ModelError` naming the first parameter that lost its mask."""
    for path, mask in masks.items():
        try:
            weight = model.get_parameter(path)
        except AttributeError:
            raise ModelError(f"{path!r} has a mask, but {type(model).__name__} has no such parameter") from None
        if weight.shape != mask.shape:
            raise ModelError(
                f"{path!r} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}; masks belong to the model "
                "that they were made for"
            )
        back = int(torch.count_nonzero(weight.detach()[~mask.to(weight.device)]))
        if back:
            raise ModelError(
                f"{back} of {int((~mask).sum())} masked weights of {path!r} are not zero any more; train with "
                "prune.masks.hold(model, masks, optimizer), or call finalize() before saving"
            )


def finalize(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Makes the masks permanent: `model` itself, with zeros where they say so, checked; the masks may be dropped."""
    apply_masks(model, masks)
    check(model, masks)
    return model


def from_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of all weights (two or more dimensions) that hold zeros, e.g. after loading a checkpoint."""
    weights = {path: weight.detach() for path, weight in model.named_parameters() if weight.ndim >= 2}
    return {path: weight != 0 for path, weight in weights.items() if bool((weight == 0).any())}


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Share of entries that are masked."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int((~mask).sum()) for mask in masks.values()) / max(1, total)
