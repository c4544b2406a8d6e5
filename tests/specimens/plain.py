"""Attention and recurrence in plain PyTorch: its own layers, and the hand-written kinds that people copy.

Shapes: tokens `[B, T]`, features `[B, T, C]`, answers `[B, CLASSES]` or `[B, T, VOCABULARY]`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specimens.base import Specimen, images, integers, normal, tensors, tokens

CLASSES = 5
VOCABULARY = 60


class Classifier(nn.Module):
    """`nn.TransformerEncoder` over embedded tokens; the mean is classified."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.positions = nn.Parameter(torch.randn(1, 20, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words) + self.positions[:, : words.shape[1]]
        return self.head(self.encoder(x).mean(1))


class AttentionBlock(nn.Module):
    """`nn.MultiheadAttention` and a feed-forward layer, both with a sum; `[T, B, 32]`, the layer's own order."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(x + self.mlp(self.norm2(x)))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` with keys and values of other widths; may answer the mean weights too."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self.show = show
        self.attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, weights = self.attention(query, key, value, need_weights=self.show)
        return (self.head(query + x), weights) if self.show else self.head(query + x)


def three_sequences(variant: int) -> tuple[Any, ...]:
    """Query, key, value."""
    batch, long = 2 + variant, 6 + 3 * variant
    return (normal(batch, 4, 32, seed=1), normal(batch, long, 24, seed=2), normal(batch, long, 40, seed=3))


class Decoder(nn.Module):
    """`nn.TransformerDecoderLayer` twice, with a causal mask, over a memory that comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerDecoderLayer(32, 4, 128, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(32))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, words: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.decoder(self.embedding(words), memory, tgt_mask=mask, tgt_is_causal=True))


def words_and_memory(variant: int) -> tuple[Any, ...]:
    """Tokens and a memory of another length."""
    batch = 2 + variant
    return (integers(VOCABULARY, batch, 7 + variant, seed=variant), normal(batch, 5 + variant, 32, seed=variant))


class CharacterLstm(nn.Module):
    """Embedding, two layers of LSTM, a linear layer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.lstm = nn.LSTM(24, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(words))[0])


class TaggerGru(nn.Module):
    """Two bidirectional GRU layers; the last states of both directions are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.gru = nn.GRU(24, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        _, states = self.gru(self.embedding(words))
        return self.head(torch.cat([states[-2], states[-1]], 1))


class StatefulLstm(nn.Module):
    """Bidirectional LSTM given `h0` and `c0` by its caller, `[T, B, C]`; the states are made by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.h0, self.c0 = nn.Linear(6, 32), nn.Linear(6, 32)
        self.lstm = nn.LSTM(16, 32, bidirectional=True)
        self.head, self.memory = nn.Linear(64, CLASSES), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        out, (_, cell) = self.lstm(x, (self.h0(start), self.c0(start)))
        return self.head(out), self.memory(cell)


def sequence_and_start(variant: int) -> tuple[Any, ...]:
    """A sequence, and what the states of both directions are made of."""
    batch = 2 + variant
    return (normal(6 + 2 * variant, batch, 16, seed=variant), normal(2, batch, 6, seed=variant + 5))


class FusedCausal(nn.Module):
    """Self-attention as in nanoGPT: one layer for queries, keys and values, split by the width it was made with."""

    def __init__(self, n_embd: int, n_head: int, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd, self.flash = n_head, n_embd, flash
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = functional.softmax(att, dim=-1) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class GptBlock(nn.Module):
    """LayerNorm first."""

    def __init__(self, n_embd: int, n_head: int, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = FusedCausal(n_embd, n_head, flash)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGpt(nn.Module):
    """Two blocks, tied embeddings."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, 48), nn.Embedding(32, 48)
        self.h = nn.ModuleList([GptBlock(48, 4, flash) for _ in range(2)])
        self.ln_f = nn.LayerNorm(48)
        self.lm_head = nn.Linear(48, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class TimmAttention(nn.Module):
    """One layer for queries, keys and values, taken apart by reshape and permute, as in timm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class TimmBlock(nn.Module):
    """Attention and MLP, each scaled for every channel."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TimmAttention(dim, num_heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ls1, self.ls2 = nn.Parameter(0.5 * torch.ones(dim)), nn.Parameter(0.5 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class TimmVit(nn.Module):
    """Patches, class token, positions, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 48, 8, 8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 48)), nn.Parameter(torch.randn(1, 17, 48))
        self.blocks = nn.Sequential(TimmBlock(48, 4), TimmBlock(48, 4))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def rotated(x: Tensor) -> Tensor:
    """Rotary positions for `[B, heads, T, D]`, halves of a head as the two coordinates (Su et al., 2021)."""
    steps, size = x.shape[-2], x.shape[-1]
    frequency = 100.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angle = torch.arange(steps, device=x.device)[:, None] * frequency
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class MultiQuery(nn.Module):
    """All query heads share one head of keys and values (Shazeer, 2019); rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, self.head_dim, bias=False), nn.Linear(width, self.head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = rotated(self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        k, v = rotated(self.k(x)[:, None]), self.v(x)[:, None]
        weights = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class MqaModel(nn.Module):
    """Two layers with RMSNorm and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 48)
        self.attention = nn.ModuleList(MultiQuery(48, 6) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(48, 128, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(48, 128, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(128, 48, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(48) for _ in range(5))
        self.head = nn.Linear(48, VOCABULARY, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            normed = self.norms[2 * i + 1](x)
            x = x + self.down[i](functional.silu(self.gate[i](normed)) * self.up[i](normed))
        return self.head(self.norms[4](x))


PLAIN = [
    Specimen("encoder_post_norm", partial(Classifier, norm_first=False), tokens(VOCABULARY)),
    Specimen("encoder_pre_norm", partial(Classifier, norm_first=True), tokens(VOCABULARY)),
    Specimen("attention_block", AttentionBlock, tensors((7, 2, 32), (9, 3, 32))),
    Specimen("cross_attention", partial(CrossAttention, show=False), three_sequences),
    # The mean over the heads is an answer: over those that stay.
    Specimen("cross_attention_weights", partial(CrossAttention, show=True), three_sequences),
    Specimen("decoder", Decoder, words_and_memory),
    Specimen("lstm", CharacterLstm, tokens(VOCABULARY)),
    Specimen("gru_bidirectional", TaggerGru, tokens(VOCABULARY)),
    Specimen("lstm_given_states", StatefulLstm, sequence_and_start),
    # The width of the stream is also that of the heads (`C // n_head`): both lose the same.
    Specimen("nanogpt", partial(NanoGpt, flash=False), tokens(VOCABULARY)),
    Specimen("nanogpt_flash", partial(NanoGpt, flash=True), tokens(VOCABULARY)),
    # As above (`reshape(B, N, C)`).
    Specimen("timm_vit", TimmVit, images(grow=0)),
    # One head of keys and values cannot go; half of the query heads and of the feed-forward layer can.
    Specimen("mqa_rope", MqaModel, tokens(VOCABULARY)),
]
