"""Smaller configurations of Hugging Face models; `transformers` is not imported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from tersor.distill.students.counted import COUNTS, PER_LAYER
from tersor.distill.students.sizes import rounded, share, spread
from tersor.errors import ModelError

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
GROUPED = "num_key_value_heads"
INNER = ("n_inner", "d_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
INNER_END = "intermediate_size"
FOLLOW = ("embedding_size", "pooler_hidden_size", "word_embed_proj_dim")  # the hidden size, under a second name


def is_configured(module: nn.Module) -> bool:
    """Whether a module looks like a Hugging Face model: it is built from its `config`."""
    return hasattr(getattr(module, "config", None), "to_dict")


def configured(teacher: nn.Module, width: float, depth: float) -> Callable[[], nn.Module]:
    """Builds a model of the teacher's class with a smaller configuration.

    Heads keep their size and become fewer; the hidden size goes with them. Vocabulary, positions and labels stay.

    Raises:
        ModelError: if the configuration has no hidden size, or holds configurations of parts.
    """
    name, config = type(teacher).__name__, copy.deepcopy(_config(teacher))
    parts = [key for key, value in vars(config).items() if hasattr(value, "to_dict")]
    if parts:
        raise ModelError(
            f"{name}: its configuration is made of others ({', '.join(parts)}), and what must fit between them is not "
            "known; build the student from a configuration of your own, or take layers of the teacher with every_kth"
        )
    if not any(key in vars(config) for key in HIDDEN):
        raise ModelError(
            f"{name}: expected a configuration with one of {list(HIDDEN)}, {type(config).__name__} has none; build the "
            "student from a configuration of your own, or take layers of the teacher with every_kth"
        )
    if width != 1:
        _narrow(config, width)
    if depth != 1:
        _shorten(config, depth)

    def build() -> nn.Module:
        try:
            student: nn.Module = type(teacher)(copy.deepcopy(config))
        except Exception as error:
            raise ModelError(
                f"{name} cannot be built at width {width:g} and depth {depth:g} of the teacher: {error}; try others, "
                "or build the student from a configuration of your own"
            ) from error
        return student

    return build


def _config(module: nn.Module) -> Any:
    return module.config


def _narrow(config: Any, width: float) -> None:
    fields = dict(vars(config))
    heads = {key: fields[key] for key in HEADS if type(fields.get(key)) is int}
    for key, count in heads.items():
        setattr(config, key, share(count, width))
    grouped = fields.get(GROUPED)
    if type(grouped) is int and heads:
        queries = getattr(config, next(iter(heads)))
        most = min(share(grouped, width), queries)
        setattr(config, GROUPED, next(count for count in range(most, 0, -1) if queries % count == 0))
    for key in HIDDEN:
        hidden = fields.get(key)
        if type(hidden) is int:
            smaller = _hidden(hidden, list(heads.values()), width)
            setattr(config, key, smaller)
            for other in FOLLOW:
                if fields.get(other) == hidden:
                    setattr(config, other, smaller)
    for key, value in fields.items():
        if type(value) is int and (key in INNER or key.endswith(INNER_END)):
            setattr(config, key, rounded(value, width))


def _hidden(hidden: int, heads: list[int], width: float) -> int:
    """The hidden size is a multiple of all numbers of heads, before and after."""
    if heads and len(set(heads)) == 1 and hidden % heads[0] == 0:
        return share(heads[0], width) * (hidden // heads[0])
    return rounded(hidden, width)


def _shorten(config: Any, depth: float) -> None:
    fields = dict(vars(config))
    counts = {key: fields[key] for key in COUNTS if type(fields.get(key)) is int}
    for key, count in counts.items():
        setattr(config, key, share(count, depth))
    for key, value in fields.items():
        if isinstance(value, list | tuple) and len(value) in counts.values() and PER_LAYER.search(key):
            kept = spread(len(value), share(len(value), depth))
            setattr(config, key, type(value)(value[position] for position in kept))
