"""A tiny BERT with a tokenizer of sixty words, on disk as `save_pretrained` leaves it; imports `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = tuple(f"w{index}" for index in range(60))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LONGEST = 40
CONFIG: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,  # far above the default, so that position and padding matter
}


def save_tokenizer(directory: Path) -> None:
    """Words at spaces, `[CLS]` before and `[SEP]` behind."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a word, no secret
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)
    wrapped.save_pretrained(directory)


def save_classifier(directory: Path, **changed: Any) -> BertForSequenceClassification:
    """A classifier of three named classes; and its tokenizer."""
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**{**CONFIG, **names, **changed})).eval()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def save_encoder(directory: Path, weights: Path) -> tuple[BertModel, torch.nn.Linear]:
    """An encoder and its tokenizer; its weights and those of a head for two classes in half precision in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, head = BertModel(BertConfig(**CONFIG)).eval(), torch.nn.Linear(CONFIG["hidden_size"], 2)
        model.half().float()
        head.half().float()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    tensors = {f"m.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, weights)
    return model, head


def write_sentences(file: Path, count: int, *, labels: int, seed: int) -> list[str]:
    """Different sentences of 2 to 30 words with labels, written to `file`."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 31))) + f" w{seed}" for _ in range(count)]
    file.write_text("".join(f"{text}\t{index % labels}\n" for index, text in enumerate(texts)))
    return texts
