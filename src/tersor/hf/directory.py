"""A directory as `save_pretrained` writes it: its configuration, its tokenizer, and what is refused.

Nothing is downloaded, and no code from the directory is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.errors import ArtifactError, ConfigError, RuntimeUnavailableError

VOCABULARIES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
# `config.json` belongs to them: older tokenizer settings do not name their class, and then it decides.
TOKENIZER_FILES = (
    *VOCABULARIES,
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CLASSIFIER = "ForSequenceClassification"
NO_LIMIT = 1 << 20  # tokenizers without a limit name an astronomical one


def import_transformers() -> ModuleType:
    """The `transformers` package.

    Raises:
        RuntimeUnavailableError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"models and tokenizers of Hugging Face need transformers ({error}); run: pip install 'tersor[hf]'"
        ) from error
    return transformers


@dataclass(frozen=True)
class Checkpoint:
    """A directory and its configuration.

    Attributes:
        path: The directory.
        config: What `AutoConfig` read.
        classifier: Whether it has a classification head; otherwise it is a plain encoder.
    """

    path: Path
    config: Any
    classifier: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels' names, if somebody gave them any."""
        names = dict(self.config.id2label) if self.classifier else {}
        given = any(name != f"LABEL_{index}" for index, name in names.items())
        return tuple(str(names[index]) for index in sorted(names)) if given else ()

    def check_weights(self) -> None:
        """Makes sure that weights can be read without executing anything.

        Raises:
            ArtifactError: if there is no safetensors file.
        """
        if any((self.path / name).is_file() for name in SAFE_WEIGHTS):
            return
        pickled = sorted(path.name for path in self.path.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise ArtifactError(
                f"{self.path} holds {pickled[0]}, which can execute code when it is read; it was not. Convert it where "
                "you trust it: AutoModelForSequenceClassification.from_pretrained(DIR).save_pretrained(NEW) writes "
                "safetensors"
            )
        raise ArtifactError(f"{self.path} has no weights: expected {SAFE_WEIGHTS[0]}; or give a weights file")

    def tokenizer(self) -> Any:
        """The directory's tokenizer.

        Raises:
            ConfigError: if it has none, or one that cannot be read or cannot pad.
        """
        if not any((self.path / name).is_file() for name in VOCABULARIES):
            raise ConfigError(f"{self.path} has no tokenizer: expected tokenizer.json, vocab.txt or another vocabulary")
        found = read(import_transformers().AutoTokenizer, self.path, "tokenizer")
        if found.pad_token_id is None:
            raise ConfigError(f"the tokenizer in {self.path} has no padding token; set one and save it again")
        return found

    def tokenizer_files(self) -> dict[str, Path]:
        """The files that the tokenizer is made of, by name."""
        return {name: self.path / name for name in sorted(TOKENIZER_FILES) if (self.path / name).is_file()}

    def longest(self, tokenizer: Any) -> int:
        """Tokens that the model takes at most."""
        positions = getattr(self.config, "max_position_embeddings", None) or NO_LIMIT
        return min(int(tokenizer.model_max_length), int(positions), NO_LIMIT)


def open_directory(directory: str | Path) -> Checkpoint:
    """Reads the configuration of a local directory.

    Raises:
        ConfigError: if it is no directory, has no `config.json`, or describes something else than a classifier of
            sequences or a plain encoder.
        RuntimeUnavailableError: if `transformers` is not installed.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory; nothing is downloaded: save the model there first")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; expected a directory that save_pretrained wrote")
    if (path / "adapter_config.json").is_file():
        raise ConfigError(f"{path} holds an adapter; merge it into its model and save that one")
    config = read(import_transformers().AutoConfig, path, "configuration")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{path} holds a quantized model; tersor starts from a float one")
    (name, *_) = config.architectures or ["Model"]
    classifier = name.endswith(CLASSIFIER)
    if not classifier and (not name.endswith("Model") or config.is_encoder_decoder):
        raise ConfigError(
            f"{path}: expected an architecture …{CLASSIFIER}, or a plain encoder such as BertModel; got {name}"
        )
    if classifier and config.num_labels < 2:
        raise ConfigError(f"{path}: expected at least two labels, got {config.num_labels}: regression is no text task")
    return Checkpoint(path, config, classifier)


def read(auto: Any, path: Path, what: str, **settings: Any) -> Any:
    """`auto.from_pretrained` on a local directory, its failures as `ConfigError`.

    `trust_remote_code=False` refuses code that the directory brings along instead of asking on the terminal.
    """
    try:
        return auto.from_pretrained(str(path.absolute()), local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # the library raises nearly everything, also on damaged JSON
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"the {what} in {path} cannot be read: {reason}") from error
