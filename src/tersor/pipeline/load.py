"""Loads an artifact: checks every file, opens it in its runtime, executes no code from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from tersor.core.artifact import verify
from tersor.pipeline.bench_kit import artifact_in
from tersor.pipeline.rebuild import pruned_builder
from tersor.runtimes import Session, get_runtime


def load(directory: str | Path, *, model: Callable[[], nn.Module] | None = None, threads: int | None = None) -> Session:
    """Opens an artifact as a plain callable: NumPy arrays or torch tensors in, the same kind out.

    ::

        session = tersor.load("runs/my-model/artifact")
        logits = session(images)

    Args:
        directory: The artifact, or a run directory that holds one.
        model: For PyTorch artifacts (`eager`, `inductor`): builds the untrained module, as it was before compression,
            that the weights go into; what pruning cut out of it is cut again.
        threads: Threads to use; by default what the artifact was measured with.

    Raises:
        IntegrityError: if a file is missing, truncated or was changed.
        RuntimeUnavailableError: if the runtime is not installed.
        ArtifactError: if `model` is needed and missing, or does not fit.
    """
    path = artifact_in(Path(directory))
    manifest = verify(path)
    target = manifest.target if threads is None else manifest.target.model_copy(update={"threads": threads})
    runtime = get_runtime(target.runtime)
    runtime.check_available()
    if model is not None and runtime.needs_code:
        model = pruned_builder(model, path, manifest)
    return runtime.load(path, signature=manifest.signature, target=target, model=model)
