"""Models of `transformers` that are built unlike the others: state spaces, chunks, pooled texts, experts, time series.

`initializer_range` is far above the default, so that attention and gates depend on their inputs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    BitConfig,
    BitForImageClassification,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FocalNetConfig,
    FocalNetForImageClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
    PatchTSTConfig,
    PatchTSTForPrediction,
    Phi3Config,
    Phi3ForCausalLM,
    WavLMConfig,
    WavLMForCTC,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from specimens.base import Specimen, lively, normal
from specimens.transformers_text import DECODER, ENCODER, SPREAD, VOCABULARY, ids, padded, wave
from specimens.transformers_vision import pixels


def longformer() -> nn.Module:
    """Attention in overlapping chunks of 4 steps, and from the first step to all."""
    return LongformerForSequenceClassification(LongformerConfig(**ENCODER, pad_token_id=0, attention_window=4))


def funnel() -> nn.Module:
    """Two blocks, the second over half as many steps; relative positions, biases `[heads, size]`."""
    config = FunnelConfig(
        vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=48, n_head=4, d_head=12, d_inner=192, num_decoder_layers=1,
        num_labels=3, initializer_range=SPREAD,
    )  # fmt: skip
    return FunnelForSequenceClassification(config)


def xlnet() -> nn.Module:
    """Weights `[width, heads, size]`, contracted by einsum; shifted relative positions."""
    config = XLNetConfig(
        vocab_size=VOCABULARY, d_model=48, n_layer=2, n_head=4, d_inner=192, num_labels=3, initializer_range=SPREAD,
        pad_token_id=0,
    )  # fmt: skip
    return XLNetForSequenceClassification(config)


def deepseek_v3() -> nn.Module:
    """Latent keys and values; a dense layer, then 4 experts in groups of 2 and a shared one, by grouped products."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **DECODER | {"num_key_value_heads": 8}, moe_intermediate_size=48, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=24, q_lora_rank=32,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, experts_implementation="grouped_mm",
        )
    )  # fmt: skip


def phi3() -> nn.Module:
    """Queries, keys and values in one layer, gate and up in another."""
    return Phi3ForCausalLM(Phi3Config(**DECODER, pad_token_id=0, attn_implementation="eager"))


def bloom() -> nn.Module:
    """Biases by distance (ALiBi); heads and their queries, keys and values interleaved in one layer."""
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4, initializer_range=SPREAD, use_cache=False
    )
    return BloomForCausalLM(config)


def mamba2() -> nn.Module:
    """State spaces of 8 heads in 2 groups, in chunks of 8 steps."""
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=48, state_size=8, num_hidden_layers=2, head_dim=12, num_heads=8, n_groups=2,
        chunk_size=8, use_cache=False, initializer_range=SPREAD,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def wavlm() -> nn.Module:
    """Gated relative positions; the width is that of the heads, and a grouped convolution runs over it."""
    config = WavLMConfig(
        vocab_size=24, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        conv_dim=[32, 32, 32], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_buckets=8, max_bucket_distance=16, layerdrop=0.0,
        initializer_range=SPREAD,
    )  # fmt: skip
    return WavLMForCTC(config)


def bit() -> nn.Module:
    """Weights standardised by BatchNorm, GroupNorm after them, two stages of bottlenecks."""
    config = BitConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_groups=4, num_labels=10)
    return lively(BitForImageClassification(config))


def focalnet() -> nn.Module:
    """Depthwise contexts of growing size, gated and summed; three stages."""
    return FocalNetForImageClassification(
        FocalNetConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 1, 1], focal_levels=[2, 2, 2],
            focal_windows=[3, 3, 3], num_labels=10, initializer_range=SPREAD,
        )
    )  # fmt: skip


def patchtst() -> nn.Module:
    """Three series of 32 steps in patches of 8, each series by itself; answers 6 steps."""
    config = PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, prediction_length=6, d_model=32,
        num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, loss="mse",
    )  # fmt: skip
    return PatchTSTForPrediction(config)


def series(variant: int) -> dict[str, Any]:
    """`past_values`."""
    return {"past_values": normal(2 + variant, 32, 3, seed=variant)}


OTHER = [
    # Where the global attention is depends on data.
    Specimen("longformer", longformer, padded, export=False),
    Specimen("funnel", funnel, padded),
    # The exporter cannot subtract the mask from a number.
    Specimen("xlnet", xlnet, padded, export=False),
    # ONNX has no grouped product.
    Specimen("deepseek_v3", deepseek_v3, ids, export=False),
    Specimen("phi3", phi3, padded),
    Specimen("bloom", bloom, padded),
    Specimen("mamba2", mamba2, ids),
    Specimen("wavlm", wavlm, wave),
    Specimen("bit", bit, pixels(grow=0)),
    Specimen("focalnet", focalnet, pixels(grow=0)),
    Specimen("patchtst", patchtst, series),
]
