"""Mixtures of experts of `transformers`, built from tiny configurations; imports `transformers`.

`initializer_range` is far above the default, so that routers and experts differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from specimens.base import integers

VOCABULARY = 120
# What most share: 2 layers, 8 heads of 8 for queries, 2 for keys and values.
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.15,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3, "num_key_value_heads": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
TWO_OF_SIX: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
TWO_OF_SIX_: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}


def ids(variant: int) -> dict[str, Any]:
    """`input_ids` alone."""
    return {"input_ids": integers(VOCABULARY, 2 + variant, 12 + 4 * variant, seed=variant)}


def pairs(variant: int) -> dict[str, Any]:
    """Texts, and the start of the answers."""
    return ids(variant) | {"decoder_input_ids": integers(VOCABULARY, 2 + variant, 9 + variant, seed=7)}


def mixtral(experts: str = "eager", **other: Any) -> nn.Module:
    """Experts in one tensor; three ways to multiply by them."""
    return MixtralForCausalLM(MixtralConfig(**DECODER | TWO_OF_SIX | other, experts_implementation=experts))


def deepseek(groups: int, open_groups: int) -> nn.Module:
    """Sigmoid, a bias of the choice, shared experts, groups."""
    config = DeepseekV3Config(
        **DECODER | LATENT, n_routed_experts=12, num_experts_per_tok=2, n_group=groups, topk_group=open_groups
    )
    model = DeepseekV3ForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(std=0.02)
    return model


def deepseek_2(**other: Any) -> nn.Module:
    """Softmax, shared experts, groups by their best expert."""
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(**DECODER | LATENT | other, n_routed_experts=8, num_experts_per_tok=2)
    )


def switch() -> nn.Module:
    """One expert for each token, in a dictionary of modules."""
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=6, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, use_cache=False,
        initializer_factor=5.0, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


def nllb() -> nn.Module:
    """The best expert and the best of the others; capacity follows the number of experts."""
    config = NllbMoeConfig(
        vocab_size=VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=6, encoder_sparse_step=2,
        decoder_sparse_step=2, max_position_embeddings=40, use_cache=False, init_std=0.15, expert_capacity=64,
        moe_eval_capacity_token_fraction=1.0, decoder_start_token_id=0,
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config)


def jetmoe() -> nn.Module:
    """Experts in attention as well."""
    config = JetMoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_key_value_heads=4, kv_channels=8,
        intermediate_size=48, max_position_embeddings=40, initializer_range=0.15, use_cache=False, **TWO_OF_SIX,
    )  # fmt: skip
    return JetMoeForCausalLM(config)


def dbrx() -> nn.Module:
    """All experts' rows in one matrix."""
    config = DbrxConfig(
        d_model=64, n_heads=8, n_layers=2, max_seq_len=40, vocab_size=VOCABULARY, use_cache=False,
        initializer_range=0.15, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 64},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config.attn_config.rope_theta = 1e4  # the model reads it, the configuration does not have it
    return DbrxForCausalLM(config)


def llama4() -> nn.Module:
    """Every expert sees every token, weighted by zero where it was not chosen."""
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **DECODER | TWO_OF_SIX, head_dim=8, intermediate_size_mlp=64, interleave_moe_layer_step=1,
            attention_chunk_size=32,
        )
    )  # fmt: skip


def longcat() -> nn.Module:
    """Some experts are the identity and have no weights."""
    config = LongcatFlashConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_layers=1, num_attention_heads=8, ffn_hidden_size=64,
        expert_ffn_hidden_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, head_dim=8, moe_topk=2, n_routed_experts=4, zero_expert_num=2, max_position_embeddings=40,
        initializer_range=0.15, use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LongcatFlashForCausalLM(config)


def jamba() -> nn.Module:
    """Mixtures in every other layer, state spaces in between."""
    config = JambaConfig(
        **DECODER | TWO_OF_SIX_ | {"num_hidden_layers": 4}, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    return JambaForCausalLM(config)


# name -> (model, inputs)
MIXTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "mixtral_eager": (mixtral, ids),
    "mixtral_batched": (partial(mixtral, "batched_mm"), ids),
    "mixtral_grouped": (partial(mixtral, "grouped_mm"), ids),
    "qwen2": (lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **DECODER | TWO_OF_SIX_, moe_intermediate_size=24, shared_expert_intermediate_size=40)), ids),
    "qwen3": (lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **DECODER | TWO_OF_SIX_, head_dim=8, moe_intermediate_size=24)), ids),
    "olmoe": (lambda: OlmoeForCausalLM(OlmoeConfig(**DECODER | TWO_OF_SIX_)), ids),
    "gpt_oss": (lambda: GptOssForCausalLM(GptOssConfig(**DECODER | TWO_OF_SIX, head_dim=8)), ids),
    "granite": (lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**DECODER | TWO_OF_SIX)), ids),
    "phimoe": (lambda: PhimoeForCausalLM(PhimoeConfig(**DECODER | TWO_OF_SIX)), ids),
    "ernie": (lambda: Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(
        **DECODER, moe_num_experts=6, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=0)), ids),
    "deepseek_3": (partial(deepseek, 1, 1), ids),
    "deepseek_3_groups": (partial(deepseek, 4, 2), ids),
    "deepseek_2": (deepseek_2, ids),
    "deepseek_2_groups": (
        partial(deepseek_2, topk_method="group_limited_greedy", n_group=2, topk_group=1), ids),
    "switch": (switch, pairs),
    "nllb": (nllb, pairs),
    "jetmoe": (jetmoe, ids),
    "jamba": (jamba, ids),
    "dbrx": (dbrx, ids),
    "llama4": (llama4, ids),
    "longcat": (longcat, ids),
}  # fmt: skip


def built(name: str, seed: int = 0) -> nn.Module:
    """The model, seeded, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MIXTURES[name][0]().eval()
