"""Transformers as classifiers of token sequences that `torch.export` takes with any batch and any length.

Shapes: `B` batch, `T` tokens, `H` hidden size, `L` labels.

**Attention** is computed step by step (`attn_implementation="eager"`). Both ways were tried through `graph.capture`
with dynamic batch and tokens, both export and run equally fast in ONNX Runtime and OpenVINO; but only the steps are
supported by every architecture (DeBERTa and MPNet have no other), and they show products and softmax to quantization
and pruning, which one fused operator hides.

**Positions and token types** are passed explicitly where the model would make the same ones itself: it cuts them out
of a buffer of, say, 512 entries, which ties the exported length to that buffer ("Constraints violated (tokens)").
Whether they are the same is not guessed from the architecture's name but tried: RoBERTa, for one, counts otherwise.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.weights import fill, read_weights
from tersor.errors import ConfigError, ModelError
from tersor.hf.directory import Checkpoint, import_transformers, open_directory, read

ATTENTION = "eager"
HEAD = "head.weight"
EXPLICIT = (("position_ids", "token_type_ids"), ("token_type_ids",), ("position_ids",), ())


class SequenceClassifier(nn.Module):
    """A `…ForSequenceClassification` model that returns its logits only.

    Args:
        m: The model.
    """

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m
        self.num_labels = int(_config(m).num_labels)
        self.explicit = _explicit(m)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T]`, `[B, T]` (1 where there is a token, 0 where padding) -> logits `[B, L]`."""
        return _call(self.m, self.explicit, input_ids, attention_mask)


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its outputs over the tokens that are no padding, and a linear head.

    `logits = W · Σ_t mask_t · h_t / Σ_t mask_t + b` (mean pooling as in Sentence-BERT,
    https://arxiv.org/abs/1908.10084).

    Args:
        m: The encoder.
        num_labels: Labels of the head.
    """

    def __init__(self, m: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.m = m
        self.head = nn.Linear(int(_config(m).hidden_size), num_labels)
        self.num_labels = num_labels
        self.explicit = _explicit(m)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T]`, `[B, T]` (1 where there is a token, 0 where padding) -> logits `[B, L]`."""
        hidden = _call(self.m, self.explicit, input_ids, attention_mask)  # [B, T, H]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1).clamp(min=1))
        return logits


def load_model(directory: str | Path, weights: str | Path | None = None) -> nn.Module:
    """A classifier from a local directory, in evaluation mode and float32; nothing is downloaded or executed.

    Args:
        directory: `config.json` and, unless `weights` holds everything, `model.safetensors`.
        weights: For a plain encoder, such as a sentence encoder, required: a file with the encoder's weights under
            `m.` and with `head.weight` `[L, H]` and `head.bias` `[L]`. For a checkpoint with a classification head
            optional: a file with the checkpoint's own keys. Half precision becomes float32.

    Returns:
        `SequenceClassifier` or `MeanPooledClassifier`: `(input_ids, attention_mask)` -> logits `[B, L]`.

    Raises:
        ConfigError: if the directory is none of these, or a plain encoder has no head weights.
        ArtifactError: if weights are missing, damaged or pickled.
        ModelError: if weights do not fit.
        RuntimeUnavailableError: if `transformers` is not installed.
    """
    checkpoint = open_directory(directory)
    if not checkpoint.classifier:
        if weights is None:
            raise ConfigError(
                f"{checkpoint.path} is a plain encoder ({type(checkpoint.config).__name__}) without a classification "
                f"head: give weights, a file with {HEAD}, head.bias and the encoder's weights under m."
            )
        return fill(_pooled(checkpoint, Path(weights)), weights)
    if weights is None:
        return SequenceClassifier(_pretrained(checkpoint)).eval()
    return SequenceClassifier(fill(_blank(checkpoint), weights)).eval()


def blank_model(directory: str | Path, like: str | Path) -> nn.Module:
    """The same with random weights: what weights that were pruned go into.

    Args:
        directory: As in `load_model`.
        like: A weights file whose head says how many labels there are, if the directory does not.
    """
    checkpoint = open_directory(directory)
    if checkpoint.classifier:
        return SequenceClassifier(_blank(checkpoint)).eval()
    return _pooled(checkpoint, Path(like)).eval()


def _pooled(checkpoint: Checkpoint, weights: Path) -> MeanPooledClassifier:
    head = read_weights(weights).get(HEAD)
    if head is None or head.ndim != 2:
        raise ConfigError(f"{weights} has no {HEAD} [labels, hidden], so the number of labels is unknown")
    with torch.random.fork_rng(devices=[]):
        return MeanPooledClassifier(_blank(checkpoint), int(head.shape[0]))


def _blank(checkpoint: Checkpoint) -> nn.Module:
    """A model with random weights; the caller's random numbers stay as they are."""
    transformers = import_transformers()
    auto = transformers.AutoModelForSequenceClassification if checkpoint.classifier else transformers.AutoModel
    with torch.random.fork_rng(devices=[]):
        try:
            found = auto.from_config(checkpoint.config, attn_implementation=ATTENTION, trust_remote_code=False)
        except (ValueError, ImportError, AttributeError) as error:
            raise ConfigError(f"{checkpoint.path}: {' '.join(str(error).split())[:300]}") from error
    model: nn.Module = found.float().eval()
    return model


def _pretrained(checkpoint: Checkpoint) -> nn.Module:
    checkpoint.check_weights()
    with torch.random.fork_rng(devices=[]):
        found, said = read(
            import_transformers().AutoModelForSequenceClassification,
            checkpoint.path,
            "model",
            use_safetensors=True,
            attn_implementation=ATTENTION,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(map(str, said.get("missing_keys", ())))
    if missing:
        raise ModelError(f"the weights in {checkpoint.path} lack {', '.join(missing[:5])}; they would be random")
    model: nn.Module = found.eval()
    return model


def _config(module: nn.Module) -> Any:
    return module.config


def _call(module: nn.Module, explicit: tuple[str, ...], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The first output: logits `[B, L]` or hidden states `[B, T, H]`."""
    extra: dict[str, Tensor] = {}
    if "position_ids" in explicit:
        extra["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    if "token_type_ids" in explicit:
        extra["token_type_ids"] = torch.zeros_like(input_ids)
    output: Tensor = module(input_ids=input_ids, attention_mask=attention_mask, **extra)[0]
    return output


def _explicit(module: nn.Module) -> tuple[str, ...]:
    """The inputs that the model makes itself just as `_call` does: tried on two rows, one of them padded."""
    config = _config(module)
    accepted = set(inspect.signature(module.forward).parameters)
    padding = getattr(config, "pad_token_id", None) or 0
    input_ids = torch.arange(2, 12).reshape(2, 5) % int(config.vocab_size)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 3:], attention_mask[1, 3:] = padding, 0
    with torch.no_grad():
        expected = _call(module, (), input_ids, attention_mask)
        for names in EXPLICIT:
            if accepted >= set(names) and torch.equal(_call(module, names, input_ids, attention_mask), expected):
                return names
    return ()
