"""`nn.MultiheadAttention` that does not insist on `embed_dim = heads · head_dim`, so that heads can go.

Shapes: `B` batch, `T` target tokens, `S` source tokens, `E` width, `H` heads, `D` width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrunableAttention(nn.MultiheadAttention):
    """The same parameters and the same answers; `num_heads` and `head_dim` are free (Vaswani et al. 2017).

    A module takes this class in place, its parameters and their names stay.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (part.unsqueeze(1 - self.batch_first) for part in (query, key, value))
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = self._project(query, key, value)
        q, k, v = (
            part.view(part.shape[0], part.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for part in (q, k, v)
        )
        mask = self._mask(query, key, key_padding_mask, attn_mask, is_causal)
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask
            shares = functional.dropout(torch.softmax(scores, -1), self.dropout, self.training)
            answer = shares @ v
            weights = shares.mean(1) if average_attn_weights else shares
            weights = weights if batched else weights.squeeze(0)
        else:
            answer = functional.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        answer = self.out_proj(answer.transpose(1, 2).reshape(q.shape[0], q.shape[2], self.num_heads * self.head_dim))
        if not self.batch_first:
            answer = answer.transpose(0, 1)
        return (answer if batched else answer.squeeze(1 - self.batch_first)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (
            functional.linear(part, weight, bias)
            for part, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([part, torch.zeros_like(part[:, :1])], 1) for part in (k, v))
        return q, k, v

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """One additive mask, `[B or 1, H or 1, T, S]`."""
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(1)
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, query.dtype)
            shape = (query.shape[0], -1, *total.shape[-2:])
            total = total[None, None] if total.dim() == 2 else total.reshape(shape)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query.dtype)
            padding = padding[None] if padding.dim() == 1 else padding
            padding = padding[:, None, None]
            total = padding if total is None else total + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        if total is not None and extra:
            total = functional.pad(total, (0, extra))
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def attention_paths(model: nn.Module) -> list[str]:
    """Modules that are exactly `nn.MultiheadAttention`."""
    return [path for path, module in model.named_modules() if type(module) is nn.MultiheadAttention]


def free_attention(model: nn.Module, path: str) -> None:
    """Gives the module at `path` the class whose heads can go, in place."""
    module: Any = model.get_submodule(path)
    module.__class__ = PrunableAttention
    module._qkv_same_embed_dim = False  # keeps `nn.TransformerEncoderLayer` from its fused kernel


@contextmanager
def prunable_attention(model: nn.Module) -> Iterator[None]:
    """The same for all such modules while the body runs."""
    modules: list[Any] = [model.get_submodule(path) for path in attention_paths(model)]
    for module in modules:
        module.__class__ = PrunableAttention
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = nn.MultiheadAttention
