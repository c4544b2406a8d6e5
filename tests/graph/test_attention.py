from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.graph.attention import PrunableAttention, attention_paths, free_attention, prunable_attention

WIDTH, HEADS, TARGETS, SOURCES, BATCH = 12, 3, 4, 5, 2
HIDDEN = torch.tensor([[False] * SOURCES, [False] * (SOURCES - 2) + [True] * 2])


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return layer


def triple(layer: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    """Query, key and value in the layer's own order."""
    torch.manual_seed(1)
    widths = (WIDTH, layer.kdim or WIDTH, layer.vdim or WIDTH)
    parts = [torch.randn(BATCH, steps, width) for steps, width in zip((TARGETS, SOURCES, SOURCES), widths, strict=True)]
    if not batched:
        return [part[0] for part in parts]
    return parts if layer.batch_first else [part.transpose(0, 1) for part in parts]


def assert_equal(layer: nn.MultiheadAttention, parts: list[Tensor], **options: Any) -> None:
    freed = copy.deepcopy(layer)
    free_attention(freed, "")
    assert type(freed) is PrunableAttention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own: two masks of different kinds
        wanted = layer(*parts, **options)
    got = freed(*parts, **options)
    assert (got[1] is None) == (wanted[1] is None)
    for mine, other in zip(got, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 7, "vdim": 9},
        {"kdim": 7, "vdim": 9, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
)
def test_answers_are_those_of_pytorch(
    options: dict[str, Any], batch_first: bool, batched: bool, weights: dict[str, bool]
) -> None:
    layer = attention(batch_first=batch_first, **options)
    assert_equal(layer, triple(layer, batched), **weights)


MASK = torch.ones(TARGETS, SOURCES, dtype=torch.bool).triu(2)
PER_HEAD = torch.arange(BATCH * HEADS * TARGETS * SOURCES).reshape(-1, TARGETS, SOURCES) % 7 == 3


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": MASK},
        {"attn_mask": torch.randn(TARGETS, SOURCES, generator=torch.Generator().manual_seed(0))},
        {"attn_mask": PER_HEAD},
        {"attn_mask": PER_HEAD.float()},
        {"key_padding_mask": HIDDEN},
        {"key_padding_mask": HIDDEN.float()},
        {"attn_mask": MASK, "key_padding_mask": HIDDEN},
        {"attn_mask": MASK.float(), "key_padding_mask": HIDDEN},
        {"attn_mask": PER_HEAD, "key_padding_mask": HIDDEN.float()},
    ],
)
def test_masks_hide_the_same(masks: dict[str, Tensor], extra: dict[str, bool], need_weights: bool) -> None:
    layer = attention(batch_first=True, **extra)
    assert_equal(layer, triple(layer), need_weights=need_weights, **masks)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_attention_hides_the_future(need_weights: bool) -> None:
    layer = attention(batch_first=True)
    x = triple(layer)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(TARGETS)
    assert_equal(layer, [x, x, x], attn_mask=mask, is_causal=True, need_weights=need_weights)


def test_unbatched_masks() -> None:
    layer = attention()
    assert_equal(layer, triple(layer, batched=False), attn_mask=PER_HEAD[:HEADS], key_padding_mask=HIDDEN[1])


def test_gradients_are_those_of_pytorch() -> None:
    layer = attention(batch_first=True)
    freed = copy.deepcopy(layer)
    free_attention(freed, "")
    for module in (layer, freed):
        module(*triple(layer))[0].square().sum().backward()
    for mine, other in zip(freed.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_heads_can_go() -> None:
    layer = attention(batch_first=True)
    free_attention(layer, "")
    size = WIDTH // HEADS
    parts = triple(layer)
    with torch.no_grad():
        layer.out_proj.weight[:, :size] = 0.0
        wanted = layer(*parts, need_weights=False)[0]
        rows = torch.cat([torch.arange(size, WIDTH) + WIDTH * part for part in range(3)])
        layer.in_proj_weight = nn.Parameter(layer.in_proj_weight[rows])
        layer.in_proj_bias = nn.Parameter(layer.in_proj_bias[rows])
        layer.out_proj.weight = nn.Parameter(layer.out_proj.weight[:, size:])
    layer.num_heads = HEADS - 1
    torch.testing.assert_close(layer(*parts, need_weights=False)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_does_not_use_its_fused_kernel_around_it(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(BATCH, TARGETS, WIDTH)
    wanted = layer(x)
    free_attention(layer, "self_attn")
    with torch.no_grad():  # where the fused kernel would be chosen
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_dropout_works_in_training_and_not_in_evaluation() -> None:
    layer = attention(batch_first=True, dropout=0.5)
    free_attention(layer, "")
    parts = triple(layer)
    for need_weights in (True, False):
        layer.eval()
        still = layer(*parts, need_weights=need_weights)[0]
        assert torch.equal(still, layer(*parts, need_weights=need_weights)[0])
        layer.train()
        assert not torch.allclose(still, layer(*parts, need_weights=need_weights)[0])


class Own(nn.MultiheadAttention):
    """A subclass may compute something else."""


def test_only_exact_classes_take_part_and_are_given_back() -> None:
    model = nn.ModuleDict({"plain": attention(), "own": Own(WIDTH, HEADS)})
    assert attention_paths(model) == ["plain"]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with suppress(RuntimeError), prunable_attention(model):
        assert type(model["plain"]) is PrunableAttention
        assert type(model["own"]) is Own
        raise RuntimeError
    assert type(model["plain"]) is nn.MultiheadAttention
    assert repr({name: dict(module.__dict__) for name, module in model.named_modules()}) == repr(before)
