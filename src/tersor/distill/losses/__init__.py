"""Distillation losses: `(student, teacher, *, settings) -> scalar`, one file each.

`__all__` names the losses, and `LOSSES` tells what each needs. On outputs, both tensors are logits `[B, …, C]`; on
features, the activations of one layer of each model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from tersor.distill.losses.attention_maps import attention_maps
from tersor.distill.losses.attention_transfer import attention_transfer
from tersor.distill.losses.base import expect_in_range, ranges_of
from tersor.distill.losses.crd import Crd as crd
from tersor.distill.losses.dist import dist
from tersor.distill.losses.dkd import dkd
from tersor.distill.losses.hint import hint
from tersor.distill.losses.jsd import jsd
from tersor.distill.losses.kd import kd
from tersor.distill.losses.l2_cosine import l2_cosine
from tersor.distill.losses.logit_standardisation import logit_standardisation
from tersor.distill.losses.minilm_relations import minilm_relations
from tersor.distill.losses.mse import mse
from tersor.distill.losses.reverse_kl import reverse_kl
from tersor.distill.losses.rkd import rkd
from tersor.distill.losses.similarity_preserving import similarity_preserving
from tersor.errors import ConfigError

__all__ = [
    "attention_maps",
    "attention_transfer",
    "crd",
    "dist",
    "dkd",
    "hint",
    "jsd",
    "kd",
    "l2_cosine",
    "logit_standardisation",
    "minilm_relations",
    "mse",
    "reverse_kl",
    "rkd",
    "similarity_preserving",
]


@dataclass(frozen=True)
class Kind:
    """What a loss compares, and what it has to be given.

    Attributes:
        function: The loss; of a trainable one the class, made with the widths of both features.
        on: Logits, or features of a layer.
        matching: Compares features element by element: the student's first go through a projector. Others on features
            take both as they are.
    """

    function: Callable[..., Any]
    on: Literal["outputs", "features"]
    matching: bool = False

    @property
    def trainable(self) -> bool:
        """Whether the loss has weights that the optimiser must see."""
        return isinstance(self.function, type)

    @property
    def needs_labels(self) -> bool:
        """Whether it is called with `labels`."""
        return "labels" in self._call

    @property
    def takes_mask(self) -> bool:
        """Whether it may be called with `mask` `[B, T]`."""
        return "mask" in self._call

    @property
    def _call(self) -> Mapping[str, inspect.Parameter]:
        called: Callable[..., Tensor] = getattr(self.function, "forward", self.function)
        return inspect.signature(called).parameters


LOSSES: Mapping[str, Kind] = MappingProxyType(
    {
        "attention_maps": Kind(attention_maps, "features"),
        "attention_transfer": Kind(attention_transfer, "features"),
        "crd": Kind(crd, "features"),
        "dist": Kind(dist, "outputs"),
        "dkd": Kind(dkd, "outputs"),
        "hint": Kind(hint, "features", matching=True),
        "jsd": Kind(jsd, "outputs"),
        "kd": Kind(kd, "outputs"),
        "l2_cosine": Kind(l2_cosine, "features", matching=True),
        "logit_standardisation": Kind(logit_standardisation, "outputs"),
        "minilm_relations": Kind(minilm_relations, "features"),
        "mse": Kind(mse, "outputs"),
        "reverse_kl": Kind(reverse_kl, "outputs"),
        "rkd": Kind(rkd, "features"),
        "similarity_preserving": Kind(similarity_preserving, "features"),
    }
)


def settings_of(name: str) -> dict[str, Any]:
    """Names and defaults of a loss's own settings; `inspect.Parameter.empty` where it must be given.

    Raises:
        ConfigError: if there is no such loss.
    """
    if name not in LOSSES:
        raise ConfigError(f"there is no distillation loss {name!r}; {_nearest(name, __all__)}")
    function = LOSSES[name].function
    parameters = inspect.signature(function).parameters
    own = [item.name for item in parameters.values() if item.kind is item.KEYWORD_ONLY]
    return {setting: parameters[setting].default for setting in own if setting in ranges_of(function)}


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses what could not be computed, before any work.

    Raises:
        ConfigError: if there is no such loss or setting (with the nearest names), a setting is out of its range, or one
            without a default is missing.
    """
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{name} has no setting {setting!r}; {_nearest(setting, list(known))}")
    ranges = ranges_of(LOSSES[name].function)
    expect_in_range(name, settings, ranges)
    for setting, default in known.items():
        if default is inspect.Parameter.empty and setting not in settings:
            raise ConfigError(f"{name}.{setting} must be given: {ranges[setting].what}")


def _nearest(name: str, known: list[str]) -> str:
    """What to write instead."""
    close = get_close_matches(name, known)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"expected one of {known}" if known else "it has none"
