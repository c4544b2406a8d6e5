"""Students of tiny models of the library `transformers`: layers, smaller sisters, and that they generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.distill.students import every_kth, family, scaled
from tersor.errors import ConfigError, ModelError
from tersor.graph import apply_surgery
from zoo import integers, normal

transformers = pytest.importorskip("transformers")

IDS = integers(38, 2, 9) + 2
TEXT: dict[str, Any] = {"input_ids": IDS}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=40, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gemma2(**other: Any) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=40, sliding_window=2, attn_implementation="eager", **other,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def t5(decoder_layers: int = 2) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=decoder_layers, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=40, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=40, decoder_start_token_id=0,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[4, 2], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config)


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
    llama: TEXT,
    gemma2: TEXT,
    bert: TEXT,
    t5: TEXT | {"decoder_input_ids": IDS[:, :5]},
    bart: TEXT | {"decoder_input_ids": IDS[:, :5]},
    swin: {"pixel_values": normal(2, 3, 32, 32)},
}
EVERY = pytest.mark.parametrize("build", INPUTS, ids=lambda build: build.__name__)
GENERATING = pytest.mark.parametrize("build", [gpt2, llama, gemma2, t5, bart], ids=lambda build: build.__name__)


def tokens(model: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(
        input_ids=IDS[:, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **how
    )
    return found


@EVERY
def test_a_shallow_student_is_a_model_of_its_configuration(build: Callable[..., nn.Module]) -> None:
    """Which is to say: it could be saved, and built again from its configuration alone."""
    student = every_kth(built(build), layers=2, example_inputs=INPUTS[build])
    again = type(student.module)(student.module.config).eval()
    again.load_state_dict(student.module.state_dict())
    with torch.no_grad():
        answers = [model(**INPUTS[build]).logits for model in (again, student.module)]
    assert torch.equal(*answers)
    assert type(student.module.config).from_dict(student.module.config.to_dict()).to_dict()


@EVERY
def test_the_surgery_makes_the_same_of_the_teachers_class(build: Callable[..., nn.Module]) -> None:
    student = every_kth(built(build), layers=2)
    assert student.surgery is not None
    replayed = apply_surgery(built(build), student.surgery)
    replayed.load_state_dict(student.module.state_dict())
    with torch.no_grad():
        answers = [model(**INPUTS[build]).logits for model in (replayed, student.module)]
    assert torch.equal(*answers)


@GENERATING
def test_a_shallow_student_generates_the_same_with_a_cache(build: Callable[..., nn.Module]) -> None:
    student = every_kth(built(build), layers=3, keep="last").module
    assert torch.equal(tokens(student, use_cache=True), tokens(student, use_cache=False))


def test_values_per_layer_follow() -> None:
    teacher = built(gemma2)
    student = every_kth(teacher, layers=[1, 2, 3])
    assert teacher.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert student.module.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert student.surgery is None, "no surgery could say that"
    wanted = built(gemma2)
    wanted.model.layers, wanted.config.num_hidden_layers = wanted.model.layers[1:], 3
    wanted.config.layer_types = wanted.config.layer_types[1:]
    with torch.no_grad():
        answers = [model(**TEXT, use_cache=False).logits for model in (student.module, wanted)]
    assert torch.equal(*answers)


def test_encoder_and_decoder_shrink_in_proportion() -> None:
    assert every_kth(built(t5), layers=2).layers == {"encoder.block": (0, 3), "decoder.block": (0,)}
    module: Any = every_kth(built(t5, decoder_layers=4), layers=3, path="decoder.block").module
    assert (module.config.num_layers, module.config.num_decoder_layers) == (4, 3)
    assert (module.encoder.config.num_layers, module.decoder.config.num_layers) == (4, 3)
    only = every_kth(built(bart), layers=1, path="model.decoder.layers").module.config
    assert (only.encoder_layers, only.decoder_layers, only.num_hidden_layers) == (4, 1, 4)


@EVERY
def test_half_as_wide_and_half_as_deep(build: Callable[..., nn.Module], noticed: Callable[[nn.Module], str]) -> None:
    if build is swin:
        with pytest.raises(ConfigError, match="its configuration does not name them"):
            scaled(built(build), width=0.5)
        return
    teacher = built(build)
    before, random = noticed(teacher), torch.get_rng_state()
    student = scaled(teacher, width=0.5, depth=0.5)
    assert noticed(teacher) == before
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert student(**INPUTS[build]).logits.shape == teacher(**INPUTS[build]).logits.shape
    assert sum(p.numel() for p in student.parameters()) < 0.4 * sum(p.numel() for p in teacher.parameters())
    again, other = scaled(teacher, width=0.5, depth=0.5), scaled(teacher, width=0.5, depth=0.5, seed=1)
    states = [list(model.state_dict().values()) for model in (student, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_heads_keep_their_size_and_queries_share_keys() -> None:
    config: Any = scaled(built(llama), width=0.75).config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 6, 2)
    assert (config.intermediate_size, config.num_hidden_layers, config.head_dim) == (72, 4, 8)


def test_keys_divide_queries_whatever_the_share() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=12,
        num_key_value_heads=4,
    )  # fmt: skip
    student: Any = scaled(transformers.LlamaForCausalLM(config), width=0.6)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (7, 1)
    assert student(**TEXT).logits.shape == (2, 9, 40)


def test_a_family_has_every_size_once() -> None:
    teacher = built(bert)
    members = family(teacher)
    assert {member.label for member in members} == {
        f"width {width}, depth {depth}" for width in ("1", "0.75", "0.5") for depth in ("1", "0.5")
    }
    sizes = [member.parameters for member in members]
    assert sizes == sorted(set(sizes), reverse=True)
    for _, parameters, build in members:
        assert sum(parameter.numel() for parameter in build().parameters()) == parameters
    assert members[0].parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert len(family(teacher, widths=(1.0, 0.99), depths=(1.0, 0.9))) == 1


def test_what_cannot_be_scaled_says_what_else_to_do() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = bert()

    with pytest.raises(ModelError, match=r"wraps a Hugging Face model, 'm'.*scale teacher\.m"):
        scaled(Wrapped(), width=0.5)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=small | {"vocab_size": 40},
            vision_config=small | {"image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )
    with pytest.raises(ModelError, match=r"made of others \(text_config, vision_config\)"):
        scaled(clip, width=0.5)
    with pytest.raises(ConfigError, match=r"width 0.999 of BertForSequenceClassification is the teacher itself"):
        scaled(built(bert), width=0.999, depth=0.5)


def test_what_cannot_be_built_at_a_size_is_a_model_error() -> None:
    config = transformers.LongformerConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attention_window=[4, 4], max_position_embeddings=40,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"cannot be built at width 1 and depth 0\.5"):
        scaled(transformers.LongformerForMaskedLM(config), depth=0.5)
