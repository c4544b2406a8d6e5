"""Turns `package.module:name` and `hf:…` on the command line into Python objects."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from tersor.core.candidate import Candidate
from tersor.core.task import Task
from tersor.core.weights import fill
from tersor.errors import ConfigError
from tersor.hf import PREFIX, load_model, model_directory, parse_task
from tersor.hf.models import blank_model
from tersor.prune import read_pruned
from tersor.prune.saved import WEIGHTS

Weights = Annotated[
    Path | None,
    typer.Option(help=".safetensors, a .pt that holds only tensors, or what tersor prune --out wrote."),
]


def load_object(reference: str, option: str) -> Any:
    """The object that `package.module:name` names; modules of the current directory are found.

    Raises:
        ConfigError: naming the option, the reference and what is wrong.
    """
    module_name, separator, name = reference.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{option}: expected package.module:name, got {reference!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{option}: cannot import {module_name!r}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{option}: {module_name!r} has no {name!r}")
    return getattr(module, name)


def load_candidate(reference: str, weights: Path | None) -> Candidate:
    """Builds the model, or takes it as it is, and fills in the weights; a directory is one of `tersor prune --out`."""
    encoder = model_directory(reference)
    if encoder is not None:
        if weights is None or not weights.is_dir():
            return Candidate(load_model(encoder, weights))
        return read_pruned(weights, lambda: blank_model(encoder, weights / WEIGHTS))
    found = load_object(reference, "--model")

    def build() -> nn.Module:
        model = found if isinstance(found, nn.Module) else found()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"--model: {reference} must give a torch.nn.Module, got {type(model).__name__}")
        return model

    if weights is not None and weights.is_dir():
        return read_pruned(weights, lambda: copy.deepcopy(build()))  # it is cut in place
    return Candidate(build().eval() if weights is None else fill(build(), weights))


def load_task(reference: str, model: str = "", candidate: Candidate | None = None) -> Task:
    """Builds the task, or takes it as it is.

    Args:
        reference: `package.module:name`, or `hf:train=FILE,…`.
        model: The model's reference; a `hf:` task takes its tokenizer from there.
        candidate: The model, which says how many labels a `hf:` task may have.

    Raises:
        ConfigError: if it is no task, or a `hf:` task comes without a `hf:` model.
    """
    if reference.startswith(PREFIX):
        encoder = model_directory(model)
        if encoder is None:
            raise ConfigError("--task: a task hf:… needs a model hf:DIR, whose tokenizer makes its inputs")
        module = None if candidate is None else candidate.module
        return parse_task(reference, encoder, getattr(module, "num_labels", None))
    found = load_object(reference, "--task")
    task = found if isinstance(found, Task) else found()
    if not isinstance(task, Task):
        raise ConfigError(f"--task: {reference} must give a tersor.Task, got {type(task).__name__}")
    return task
