"""Text and speech models of `transformers`, built from tiny configurations; imports `transformers`.

`initializer_range` is far above the default, so that attention depends on its inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from specimens.base import Specimen, integers, normal

VOCABULARY = 120
SPREAD = 0.15

# What the BERT family shares: 2 layers of 4 heads of 12, feed-forward 192.
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "initializer_range": SPREAD,
}
# What the Llama family shares: 2 layers, 8 heads of 8 for queries, 2 for keys and values.
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 40,
    "initializer_range": SPREAD,
    "use_cache": False,
}


def ids(variant: int) -> dict[str, Any]:
    """`input_ids` alone."""
    return {"input_ids": integers(VOCABULARY, 2 + variant, 9 + 4 * variant, seed=variant)}


def padded(variant: int) -> dict[str, Any]:
    """`input_ids` and an `attention_mask` that hides the end of the first text."""
    mask = torch.ones(2 + variant, 9 + 4 * variant, dtype=torch.long)
    mask[0, -3:] = 0
    return ids(variant) | {"attention_mask": mask}


def pairs(variant: int) -> dict[str, Any]:
    """Padded texts of two sentences each."""
    given = padded(variant)
    types = torch.zeros_like(given["input_ids"])
    types[:, 5:] = 1
    return given | {"token_type_ids": types}


def bert(attention: str) -> nn.Module:
    """Encoder with a pooler."""
    return BertForSequenceClassification(BertConfig(**ENCODER, attn_implementation=attention))


def distilbert(attention: str) -> nn.Module:
    """Encoder with other names for the same."""
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=4, hidden_dim=192, max_position_embeddings=40, num_labels=3,
        initializer_range=SPREAD, attn_implementation=attention,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def albert() -> nn.Module:
    """One layer used three times; embeddings narrower than the layer."""
    return AlbertForSequenceClassification(AlbertConfig(**ENCODER | {"embedding_size": 24, "num_hidden_layers": 3}))


def roberta() -> nn.Module:
    """Positions counted from the padding token."""
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER))


def deberta_v2() -> nn.Module:
    """As DeBERTa v3: relative positions in buckets, projected by the same keys and queries as the content."""
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **ENCODER, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True,
            norm_rel_ebd="layer_norm", position_biased_input=False, max_relative_positions=-1,
            pooler_hidden_size=48,
        )
    )  # fmt: skip


def electra() -> nn.Module:
    """Embeddings narrower than the layers."""
    return ElectraForSequenceClassification(ElectraConfig(**ENCODER | {"embedding_size": 24}))


def gpt2(attention: str) -> nn.Module:
    """Fused queries, keys and values in a `Conv1D`, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=48, n_layer=2, n_head=4, initializer_range=SPREAD,
        use_cache=False, bos_token_id=0, eos_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def opt() -> nn.Module:
    """Decoder with learned positions, narrower embeddings, tied."""
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, ffn_dim=192, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=24, init_std=SPREAD, use_cache=False,
    )  # fmt: skip
    return OPTForCausalLM(config)


def llama(attention: str, **other: Any) -> nn.Module:
    """Grouped queries, rotary positions, gated feed-forward layers."""
    return LlamaForCausalLM(LlamaConfig(**DECODER | other, attn_implementation=attention))


def qwen2() -> nn.Module:
    """Llama with biases and tied embeddings."""
    return Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True))


def mixtral(experts: str) -> nn.Module:
    """Four experts, two for each token, all experts in one tensor."""
    return MixtralForCausalLM(
        MixtralConfig(
            **DECODER | {"intermediate_size": 48}, num_local_experts=4, num_experts_per_tok=2,
            experts_implementation=experts,
        )
    )  # fmt: skip


def t5(**other: Any) -> nn.Module:
    """Encoder and decoder, relative positions in the first layer of each, tied embeddings."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=192, num_layers=2, num_heads=4, use_cache=False,
        relative_attention_num_buckets=8, decoder_start_token_id=0, **other,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def t5_inputs(variant: int) -> dict[str, Any]:
    """Padded texts and the start of the answers."""
    return padded(variant) | {"decoder_input_ids": integers(VOCABULARY, 2 + variant, 5 + 2 * variant, seed=7)}


def whisper(attention: str) -> nn.Module:
    """Two convolutions, encoder, decoder."""
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
        decoder_attention_heads=4, encoder_ffn_dim=192, decoder_ffn_dim=192, d_model=48, max_source_positions=20,
        max_target_positions=20, use_cache=False, init_std=SPREAD, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, begin_suppress_tokens=None, attn_implementation=attention,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def whisper_inputs(variant: int) -> dict[str, Any]:
    """Spectra, always of the same length, and the start of the answers."""
    answers = integers(VOCABULARY, 2 + variant, 5 + 2 * variant, seed=7)
    return {"input_features": normal(2 + variant, 16, 40, seed=variant), "decoder_input_ids": answers}


def wav2vec2() -> nn.Module:
    """Convolutions over the wave, positions by a weight-normalised grouped convolution, encoder."""
    config = Wav2Vec2Config(
        vocab_size=24, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        conv_dim=[32, 32, 32], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, layerdrop=0.0, initializer_range=SPREAD, apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def wave(variant: int) -> dict[str, Any]:
    """`input_values`, `[B, samples]`."""
    return {"input_values": normal(2 + variant, 400 + 120 * variant, seed=variant)}


TEXT = [
    Specimen("bert_eager", partial(bert, "eager"), pairs),
    Specimen("bert_sdpa", partial(bert, "sdpa"), pairs),
    Specimen("distilbert_eager", partial(distilbert, "eager"), padded),
    Specimen("distilbert_sdpa", partial(distilbert, "sdpa"), padded),
    Specimen("albert", albert, padded),
    Specimen("roberta", roberta, padded),
    Specimen("deberta_v2", deberta_v2, padded),
    Specimen("electra", electra, padded),
    Specimen("gpt2_eager", partial(gpt2, "eager"), ids),
    Specimen("gpt2_sdpa", partial(gpt2, "sdpa"), ids),
    Specimen("opt", opt, padded),
    Specimen("llama_gqa_eager", partial(llama, "eager"), padded),
    Specimen("llama_gqa_sdpa", partial(llama, "sdpa"), ids),
    Specimen("llama_14_2", partial(llama, "sdpa", hidden_size=112, num_attention_heads=14), ids),
    Specimen("qwen2", qwen2, padded),
    # A loop over the experts that were hit: what it does depends on data.
    Specimen("mixtral_loop", partial(mixtral, "eager"), ids, export=False),
    Specimen("mixtral_batched", partial(mixtral, "batched_mm"), ids),
    Specimen("t5_eager", partial(t5, attn_implementation="eager"), t5_inputs),
    # The exporter gives SDPA with a trained bias other strides than eager PyTorch does, and cannot view the result.
    Specimen("t5_sdpa", partial(t5, attn_implementation="sdpa"), t5_inputs, export=False),
    Specimen(
        "t5_gated",
        partial(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, attn_implementation="eager"),
        t5_inputs,
    ),
    Specimen("whisper_eager", partial(whisper, "eager"), whisper_inputs),
    Specimen("whisper_sdpa", partial(whisper, "sdpa"), whisper_inputs),
    Specimen("wav2vec2", wav2vec2, wave),
]
