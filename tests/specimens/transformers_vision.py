"""Image models of `transformers`, built from tiny configurations; imports `transformers`.

`initializer_range` is far above the default, so that attention and gates depend on their inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from specimens.base import Inputs, Specimen, integers, lively, normal

SPREAD = 0.15


def pixels(height: int = 32, width: int = 32, *, grow: int = 16) -> Inputs:
    """`pixel_values`, `[2, 3, H, W]` or `[3, 3, H + grow, W]`."""
    return lambda variant: {"pixel_values": normal(2 + variant, 3, height + grow * variant, width, seed=variant)}


def resnet() -> nn.Module:
    """Bottlenecks, three stages."""
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 48, 64], depths=[1, 2, 1], num_labels=10)
    return ResNetForImageClassification(config)


def mobilenet_v2() -> nn.Module:
    """A quarter of the width: at least 8 channels everywhere."""
    net = MobileNetV2ForImageClassification(
        MobileNetV2Config(
            depth_multiplier=0.25, min_depth=16, image_size=32, finegrained_output=False, num_labels=10,
        )
    )  # fmt: skip
    return lively(net)


def efficientnet() -> nn.Module:
    """Three stages; half the width of what is written here, and of the last convolution's 1280 channels."""
    net = EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32, width_coefficient=0.5, depth_coefficient=1.0, kernel_sizes=[3, 3, 5],
            in_channels=[32, 32, 48], out_channels=[32, 48, 80], strides=[1, 2, 2], num_block_repeats=[1, 2, 2],
            expand_ratios=[1, 6, 6], hidden_dim=640, num_labels=10,
        )
    )  # fmt: skip
    return lively(net)


def regnet() -> nn.Module:
    """RegNet-Y: grouped bottlenecks with gates; groups of 8 channels."""
    config = RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], groups_width=8, num_labels=10)
    return RegNetForImageClassification(config)


def convnext() -> nn.Module:
    """Three stages."""
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_stages=3, hidden_sizes=[16, 32, 48], depths=[1, 2, 2], image_size=32, num_labels=10,
            layer_scale_init_value=0.3, initializer_range=SPREAD,
        )
    )  # fmt: skip


def vit(attention: str) -> nn.Module:
    """4 heads of 12, 17 tokens."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=32,
            patch_size=8, num_labels=10, initializer_range=SPREAD, attn_implementation=attention,
        )
    )  # fmt: skip


def swin(attention: str) -> nn.Module:
    """Windows of 4 x 4, every second block shifted; 4 and 8 heads."""
    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[4, 8], window_size=4, mlp_ratio=4.0,
            num_labels=10, initializer_range=SPREAD, attn_implementation=attention,
        )
    )  # fmt: skip


def segformer() -> nn.Module:
    """Two stages, keys and values of the first at a quarter of the pixels; heads 2 and 4."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[32, 48], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[4, 4], decoder_hidden_size=32, num_labels=5,
            initializer_range=SPREAD,
        )
    )  # fmt: skip


def mobilevit() -> nn.Module:
    """All five stages; 4 heads."""
    net = MobileViTForImageClassification(
        MobileViTConfig(
            image_size=64, hidden_sizes=[32, 40, 48], neck_hidden_sizes=[16, 16, 24, 32, 32, 40, 96],
            num_attention_heads=4, expand_ratio=2.0, num_labels=10,
        )
    )  # fmt: skip
    return lively(net)


def detr() -> nn.Module:
    """ResNet backbone with frozen BatchNorm, 2 + 2 layers of 4 heads, 5 queries."""
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return DetrForObjectDetection(
        DetrConfig(
            backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_queries=5, num_labels=10,
            init_std=SPREAD,
        )
    )  # fmt: skip


CLIP_VOCABULARY = 100


def clip() -> nn.Module:
    """Two towers of 2 layers, projected to 24."""
    shared: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": SPREAD}
    text = shared | {"hidden_size": 32, "intermediate_size": 128, "vocab_size": CLIP_VOCABULARY}
    text |= {"max_position_embeddings": 20, "eos_token_id": CLIP_VOCABULARY - 1, "bos_token_id": 0, "pad_token_id": 1}
    vision = shared | {"hidden_size": 48, "intermediate_size": 192, "image_size": 32, "patch_size": 8}
    # The factor scales most initial weights; the default leaves the towers nearly blind at this width.
    text |= {"initializer_factor": 4.0}
    vision |= {"initializer_factor": 4.0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, initializer_factor=4.0))


def clip_inputs(variant: int) -> dict[str, Any]:
    """Images, and texts that end with the token at which the text tower is read."""
    text = integers(CLIP_VOCABULARY - 1, 3 + variant, 7 + 3 * variant, seed=variant)
    text[:, -1] = CLIP_VOCABULARY - 1
    return {"input_ids": text, "pixel_values": normal(2 + variant, 3, 32, 32, seed=variant)}


VISION = [
    Specimen("resnet", resnet, pixels()),
    Specimen("mobilenet_v2", mobilenet_v2, pixels()),
    Specimen("efficientnet", efficientnet, pixels()),
    Specimen("regnet", regnet, pixels()),
    Specimen("convnext", convnext, pixels()),
    # Patches and positions belong to one image size.
    Specimen("vit_eager", partial(vit, "eager"), pixels(grow=0)),
    Specimen("vit_sdpa", partial(vit, "sdpa"), pixels(grow=0)),
    Specimen("swin_eager", partial(swin, "eager"), pixels()),
    # The exporter gives SDPA with a trained bias other strides than eager PyTorch does, and cannot view the result.
    Specimen("swin_sdpa", partial(swin, "sdpa"), pixels(), export=False),
    Specimen("segformer", segformer, pixels()),
    Specimen("mobilevit", mobilevit, pixels(64, 64, grow=32)),
    Specimen("detr", detr, pixels()),
    Specimen("clip", clip, clip_inputs),
]
