"""Turns `package.module:name` on the command line into Python objects."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.task import Task
from tersor.core.weights import fill
from tersor.errors import ConfigError


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


def load_model(reference: str, weights: Path | None) -> nn.Module:
    """Builds the model, or takes it as it is, and fills in the weights."""
    found = load_object(reference, "--model")
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model: {reference} must give a torch.nn.Module, got {type(model).__name__}")
    return fill(model, weights) if weights is not None else model.eval()


def load_task(reference: str) -> Task:
    """Builds the task, or takes it as it is."""
    found = load_object(reference, "--task")
    task = found if isinstance(found, Task) else found()
    if not isinstance(task, Task):
        raise ConfigError(f"--task: {reference} must give a tersor.Task, got {type(task).__name__}")
    return task
