"""Attention taken apart computes what PyTorch's fused operator computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersor.core.batch import Batch
from tersor.graph.attention_parts import take_attention_apart
from zoo import captured, integers, normal, relative

aten = torch.ops.aten
FUSED = aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """Fused attention with whatever arguments; `[B, H, T, E]`."""

    def __init__(self, mask: Callable[[Tensor], Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.mask = mask
        self.options = options
        self.register_buffer("kept", integers(4, 5, 5, seed=3).bool() | torch.eye(5).bool())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = self.options if self.mask is None else {**self.options, "attn_mask": self.mask(self)}
        return functional.scaled_dot_product_attention(query, key, value, **options)


QUERY, KEY, VALUE = normal(3, 2, 5, 8), normal(3, 2, 5, 8, seed=1), normal(3, 2, 5, 6, seed=2)
ADDED = normal(5, 5, seed=4).masked_fill(torch.triu(torch.ones(5, 5), 1).bool(), float("-inf"))


def apart(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, int]:
    graph_module = captured(module.eval(), Batch(inputs, {}, None))
    return graph_module, take_attention_apart(graph_module)


@pytest.mark.parametrize(
    "build",
    [
        Attention,
        lambda: Attention(scale=0.7),
        lambda: Attention(is_causal=True),
        lambda: Attention(is_causal=True, scale=2.0),
        lambda: Attention(lambda module: module.kept),
        lambda: Attention(lambda module: module.kept.float()),
        lambda: Attention(lambda _: ADDED),
        lambda: Attention(lambda module: module.kept[None, None], scale=0.1),
    ],
    ids=["plain", "scale", "causal", "causal and scale", "boolean", "zeros and ones", "minus infinity", "all of it"],
)
def test_it_computes_the_same(build: Callable[[], nn.Module]) -> None:
    module = build()
    graph_module, count = apart(module, QUERY, KEY, VALUE)
    assert count == 1
    targets = [node.target for node in graph_module.graph.nodes]
    assert FUSED not in targets
    assert targets.count(aten.matmul.default) == 2
    assert targets.count(aten.softmax.int) == 1
    with torch.no_grad():
        assert relative(graph_module(QUERY, KEY, VALUE), module(QUERY, KEY, VALUE)) < 1e-6
        fewer = (QUERY[:1], KEY[:1], VALUE[:1])  # the batch is dynamic
        assert relative(graph_module(*fewer), module(*fewer)) < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_may_differ_in_number(queries: int, keys: int, causal: bool) -> None:
    inputs = (normal(2, 2, queries, 8), normal(2, 2, keys, 8, seed=1), normal(2, 2, keys, 8, seed=2))
    module = Attention(is_causal=causal)
    graph_module, _ = apart(module, *inputs)
    with torch.no_grad():
        assert relative(graph_module(*inputs), module(*inputs)) < 1e-6


def test_heads_are_not_needed() -> None:
    inputs = (normal(3, 5, 8), normal(3, 5, 8, seed=1), normal(3, 5, 8, seed=2))
    graph_module, count = apart(Attention(), *inputs)
    assert count == 1
    assert relative(graph_module(*inputs), Attention()(*inputs)) < 1e-6


class Masked(nn.Module):
    """The mask is an input."""

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(values, values, values, mask[:, None])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_may_be_an_input(dtype: torch.dtype) -> None:
    mask = (integers(3, 3, 5, 5, seed=5).bool() | torch.eye(5).bool()).to(dtype)
    graph_module, count = apart(Masked(), QUERY, mask)
    assert count == 1
    assert relative(graph_module(QUERY, mask), Masked()(QUERY, mask)) < 1e-6


def test_what_cannot_be_told_apart_stays_fused() -> None:
    dropping = Attention(dropout_p=0.1)
    graph_module, count = apart(dropping, QUERY, KEY, VALUE)
    assert count == 0
    assert FUSED in [node.target for node in graph_module.graph.nodes]
    grouped = Attention(enable_gqa=True)
    _, count = apart(grouped, normal(2, 4, 5, 8), normal(2, 2, 5, 8, seed=1), normal(2, 2, 5, 8, seed=2))
    assert count == 0


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.first(tokens, tokens, tokens, need_weights=False)[0]
        return self.second(tokens, tokens, tokens, need_weights=False)[0]


def test_every_attention_is_taken_apart_and_knows_its_module() -> None:
    module = Encoder().eval()
    graph_module, count = apart(module, normal(3, 5, 8))
    assert count == 2
    products = [node for node in graph_module.graph.nodes if node.target is aten.matmul.default]
    assert [node.meta["module"] for node in products] == ["first", "first", "second", "second"]
    assert all(isinstance(node.meta["val"], Tensor) for node in products)
    with torch.no_grad():
        assert relative(graph_module(normal(3, 5, 8)), module(normal(3, 5, 8))) < 1e-6
    assert take_attention_apart(graph_module) == 0
