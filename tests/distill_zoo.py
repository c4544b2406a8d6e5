"""Small pairs of students and teachers, with data; for tests of distillation only.

Shapes: `B` batch, `T` tokens, `C` channels, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.task import Task
from tersor.distill.losses import LOSSES
from zoo import integers, normal, seeded

VOCABULARY, TOKENS = 11, 6
FEATURES = [name for name, kind in LOSSES.items() if kind.on == "features"]
OUTPUTS = [name for name, kind in LOSSES.items() if kind.on == "outputs"]
OF_TOKENS = ("attention_maps", "minilm_relations")


def cnn(width: int, classes: int = 4, seed: int = 0) -> nn.Module:
    """Two resolutions; images `[B, 3, 8, 8]`."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
        ),
        seed,
    )  # fmt: skip


class Attention(nn.Module):
    """One head; `[B, T, D]` and the mask `[B, T]` in, `[B, T, D]` and `[B, 1, T, T]` out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / math.sqrt(hidden.shape[-1])
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(-1)
        return weights @ self.value(hidden), weights[:, None]


class Block(nn.Module):
    """Attention and a layer for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.inner = Attention(width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(hidden, mask)[0]
        return hidden + self.inner(hidden).relu()


class Language(nn.Module):
    """Tokens and their mask, `[B, T]` each, to logits `[B, T, V]`."""

    def __init__(self, width: int, blocks: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return self.head(hidden)


def language(width: int, blocks: int, seed: int = 0) -> nn.Module:
    """`Language` with weights that do not depend on the test order."""
    return seeded(lambda: Language(width, blocks), seed)


def images(count: int = 24, *, labels: bool = True, **fields: Any) -> Task:
    """Random images, random labels of four classes."""
    x, y = normal(count, 3, 8, 8), integers(4, count)
    return Task(train=(x, y) if labels else x, **fields)


def texts(count: int = 24, *, labels: bool = True, padding: int = 0, **fields: Any) -> Task:
    """Random texts of three to six tokens; what stands in their padding is `padding`."""
    mask = (torch.arange(TOKENS) < integers(4, count, seed=1)[:, None] + 3).long()
    tokens = torch.where(mask == 1, integers(VOCABULARY, count, TOKENS), padding)
    columns = {"input_ids": tokens, "attention_mask": mask}
    if labels:
        columns["labels"] = torch.where(mask == 1, integers(VOCABULARY, count, TOKENS, seed=2), -100)
    return Task(train=columns, **fields)
