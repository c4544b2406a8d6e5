"""Depth pruning of tiny transformers of the library `transformers`, and that those with caches still generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import SurgeryError
from tersor.graph import apply_surgery
from tersor.prune import DepthReport, depth
from zoo import integers, normal

transformers = pytest.importorskip("transformers")

IDS = integers(38, 2, 9) + 2
TEXT: dict[str, Any] = {"input_ids": IDS}
COUNTED = "the cache of keys and values takes its length from it"


def gpt2(**other: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=40, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1, **other
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**other: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, **other,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=40,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def t5(**other: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, **other
    )
    return transformers.T5ForConditionalGeneration(config)


def built(build: Callable[..., nn.Module], **other: Any) -> Any:
    """With weights so large that every token has a say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(**other)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


INPUTS: dict[Callable[..., nn.Module], dict[str, Any]] = {
    gpt2: TEXT,
    llama: TEXT | {"attention_mask": torch.ones_like(IDS)},
    bert: TEXT | {"attention_mask": torch.ones_like(IDS)},
    vit: {"pixel_values": normal(2, 3, 16, 16)},
    t5: TEXT | {"decoder_input_ids": IDS[:, :5]},
}
BLOCKS = {
    gpt2: [f"transformer.h.{number}" for number in range(4)],
    llama: [f"model.layers.{number}" for number in range(4)],
    bert: [f"bert.encoder.layer.{number}" for number in range(4)],
    vit: [f"vit.layers.{number}" for number in range(4)],
    t5: [f"{part}.block.{number}" for part in ("encoder", "decoder") for number in range(3)],
}
FROZEN = {gpt2: ["transformer.h.0"], llama: ["model.layers.0"], t5: ["decoder.block.0"]}
EVERY = pytest.mark.parametrize("build", BLOCKS, ids=lambda build: build.__name__)
GENERATING = pytest.mark.parametrize("build", [gpt2, llama, t5], ids=lambda build: build.__name__)


@cache
def shallow(build: Callable[..., nn.Module]) -> DepthReport:
    return depth(built(build), INPUTS[build], amount=0.5)


@EVERY
def test_blocks_go_verified_or_stay_with_a_reason(build: Callable[..., nn.Module]) -> None:
    report = shallow(build)
    frozen = {item.name: item.reason for item in report.frozen}
    assert sorted({*report.removed, *report.kept, *frozen}) == sorted(BLOCKS[build])
    assert [name for name, reason in frozen.items() if reason == COUNTED] == FROZEN.get(build, [])
    assert all(reason == COUNTED or reason.startswith("verification: ") for reason in frozen.values())
    assert len(report.removed) == len(BLOCKS[build]) // 2
    assert report.max_error is not None
    assert report.max_error < 1e-4
    assert report.macs_after < 0.75 * report.macs_before
    replayed = apply_surgery(built(build), report.surgery)
    replayed.load_state_dict(report.model.state_dict())
    with torch.no_grad():
        answers = [model(**INPUTS[build]).logits for model in (replayed, report.model)]
    assert torch.equal(*answers)


def tokens(model: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(
        input_ids=IDS[:, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **how
    )
    return found


@GENERATING
def test_a_shallow_model_generates_the_same_with_a_cache(build: Callable[..., nn.Module]) -> None:
    model = shallow(build).model
    assert torch.equal(tokens(model, use_cache=True), tokens(model, use_cache=False))


@pytest.mark.parametrize("build", [gpt2, llama], ids=lambda build: build.__name__)
def test_logits_of_one_token_at_a_time_are_those_of_all_at_once(build: Callable[..., nn.Module]) -> None:
    model, past, parts = shallow(build).model, None, []
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        for position in range(IDS.shape[1]):
            answer = model(input_ids=IDS[:, position : position + 1], **{named: past}, use_cache=True)
            past = getattr(answer, named)
            parts.append(answer.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@GENERATING
def test_the_first_block_stays_even_if_the_configuration_switches_the_cache_off(
    build: Callable[..., nn.Module],
) -> None:
    """Whoever generates switches it on again, and every token would take the first position."""
    model = built(build, use_cache=False)
    (name,) = FROZEN[build]
    with pytest.raises(SurgeryError, match=COUNTED):
        depth(model, INPUTS[build], blocks=[name])


def test_the_block_that_makes_what_the_others_need_stays() -> None:
    """The first block of a T5 computes the relative positions of all."""
    with pytest.raises(SurgeryError, match=r"block 'encoder\.block\.0' cannot be skipped: (outputs differ|the model)"):
        depth(built(t5), INPUTS[t5], blocks=["encoder.block.0"])
