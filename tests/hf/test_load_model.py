"""Models from directories: the numbers of transformers' own forward, no downloads, no code, errors that help."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, RobertaConfig

from hf import tiny
from tersor import hf
from tersor.core.batch import Batch
from tersor.errors import ArtifactError, ConfigError, ModelError, RuntimeUnavailableError
from tersor.graph import capture
from tersor.hf.models import SequenceClassifier, blank_model

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w7 unknown w3 w2"]
DYNAMIC = {name: {0: "batch", **dims} for name, dims in hf.DYNAMIC.items()}


def inputs(directory: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    made = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def copied(classifier: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier.directory, tmp_path / "copied"))


def configure(directory: Path, **changed: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


# --- numbers


def test_a_classifier_gives_the_logits_of_its_own_forward(classifier: Any) -> None:
    model, batch = hf.load_model(classifier.directory), inputs(classifier.directory)
    assert not model.training
    assert model.num_labels == 3
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), classifier.model(**batch).logits, rtol=0, atol=1e-5)


def test_an_encoder_gives_the_head_of_the_mean_of_its_tokens(encoder: Any) -> None:
    model, batch = hf.load_model(encoder.directory, encoder.weights), inputs(encoder.directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            length = len(text.split()) + 2
            alone = encoder.model(input_ids=batch["input_ids"][row : row + 1, :length]).last_hidden_state[0]
            expected = encoder.head(alone.mean(0))
            torch.testing.assert_close(model(**batch)[row], expected, rtol=0, atol=1e-4)


def test_half_precision_checkpoints_become_float32(classifier: Any, copied: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(str(copied)).half().save_pretrained(copied)
    model, batch = hf.load_model(copied), inputs(copied)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), classifier.model(**batch).logits, rtol=0, atol=1e-1)


def test_other_weights_replace_those_of_a_checkpoint(classifier: Any, copied: Path, tmp_path: Path) -> None:
    tensors = {name: value * 0.5 for name, value in load_file(copied / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half.safetensors")
    (copied / "model.safetensors").unlink()
    model = hf.load_model(copied, tmp_path / "half.safetensors")
    for name, value in model.m.state_dict().items():
        assert torch.equal(value, classifier.model.state_dict()[name] * 0.5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("config", "explicit"),
    [
        (DistilBertConfig(vocab_size=64, dim=24, n_layers=1, n_heads=2, hidden_dim=48, initializer_range=0.3),
         ("position_ids",)),
        (RobertaConfig(**{**tiny.CONFIG, "pad_token_id": 1}), ("token_type_ids",)),
    ],
    ids=["distilbert", "roberta"],
)  # fmt: skip
def test_positions_are_explicit_only_where_the_model_counts_likewise(
    config: Any, explicit: tuple[str, ...], attention: str
) -> None:
    inner = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    model = SequenceClassifier(inner).eval()
    assert model.explicit == explicit
    input_ids = torch.randint(5, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 6:], attention_mask[1, 6:] = config.pad_token_id, 0
    with torch.no_grad():
        expected = inner(input_ids=input_ids, attention_mask=attention_mask).logits
        torch.testing.assert_close(model(input_ids, attention_mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_it_is_captured_with_any_batch_and_any_length(kind: str, request: pytest.FixtureRequest) -> None:
    saved = request.getfixturevalue(kind)
    model, batch = hf.load_model(saved.directory, saved.weights), inputs(saved.directory)
    graph = capture(model, Batch((), batch, None), names=list(batch), dynamic=DYNAMIC)
    input_ids = torch.randint(4, 60, (5, 23), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[3, 4:] = 0
    with torch.no_grad():
        expected = model(input_ids, attention_mask)
        torch.testing.assert_close(graph(input_ids, attention_mask), expected, rtol=0, atol=1e-5)


def test_the_blank_model_has_the_same_shapes_and_other_weights(encoder: Any) -> None:
    model = hf.load_model(encoder.directory, encoder.weights)
    state = torch.get_rng_state()
    blank = blank_model(encoder.directory, encoder.weights)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in blank.state_dict().items()} == shapes
    assert not torch.equal(blank.head.weight, model.head.weight)


# --- safety


def test_nothing_is_asked_of_the_network(classifier: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"tried to connect: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    hf.load_model(classifier.directory)
    hf.load_model(encoder.directory, encoder.weights)


def test_pickled_weights_are_refused(copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin.*Convert"):
        hf.load_model(copied)


def test_code_in_the_directory_is_not_executed(copied: Path) -> None:
    (copied / "mine.py").write_text("raise SystemExit('executed')\n")
    configure(copied, model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})
    with pytest.raises(ConfigError, match="cannot be read"):
        hf.load_model(copied)


# --- what is refused, and how


def test_without_transformers_the_extra_is_named(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'tersor\[hf\]'"):
        hf.load_model(classifier.directory)


def test_a_missing_directory_is_not_looked_for_on_a_hub() -> None:
    with pytest.raises(ConfigError, match="bert-base-uncased is not a directory; nothing is downloaded"):
        hf.load_model("bert-base-uncased")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"no config\.json"),
        (lambda path: (path / "config.json").write_text("{"), "configuration in .* cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "adapter"),
        (lambda path: configure(path, quantization_config={"quant_method": "gptq"}), "quantized"),
        (lambda path: configure(path, architectures=["BertForMaskedLM"]), "got BertForMaskedLM"),
        (lambda path: configure(path, id2label={"0": "x"}, label2id={"x": 0}), "at least two labels"),
    ],
    ids=["no-config", "damaged", "adapter", "quantized", "other-head", "regression"],
)
def test_directories_that_are_no_classifier(copied: Path, spoil: Any, message: str) -> None:
    spoil(copied)
    with pytest.raises(ConfigError, match=message):
        hf.load_model(copied)


def test_no_weights_at_all(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no weights: expected model\.safetensors"):
        hf.load_model(copied)


def test_a_checkpoint_without_its_head_is_no_random_classifier(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "classifier.bias"}, copied / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"lack classifier\.bias"):
        hf.load_model(copied)


def test_a_plain_encoder_needs_a_head(encoder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plain encoder.*head\.weight"):
        hf.load_model(encoder.directory)
    headless = {name: value for name, value in load_file(encoder.weights).items() if not name.startswith("head")}
    save_file(headless, tmp_path / "headless.safetensors")
    with pytest.raises(ConfigError, match=r"no head\.weight"):
        hf.load_model(encoder.directory, tmp_path / "headless.safetensors")


def test_weights_of_another_model_are_told(encoder: Any, classifier: Any) -> None:
    with pytest.raises(ModelError, match="do not fit"):
        hf.load_model(classifier.directory, encoder.weights)


def test_the_wrappers_need_no_more_than_a_configuration() -> None:
    class Bag(nn.Module):
        """Sums embeddings; takes no positions."""

        def __init__(self) -> None:
            super().__init__()
            self.config = RobertaConfig(vocab_size=9, hidden_size=4)
            self.table = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
            return (self.table(input_ids) * attention_mask.unsqueeze(-1),)

    model = hf.MeanPooledClassifier(Bag(), 3)
    assert model.explicit == ()
    assert model(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)).shape == (2, 3)
