"""From a freshly built model back to the pruned one of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from tersor.core.artifact import SURGERY, Manifest, parse_surgeries
from tersor.prune.saved import replay_on


def pruned_builder(build: Callable[[], nn.Module], directory: Path, manifest: Manifest) -> Callable[[], nn.Module]:
    """Builds the module in the shapes that an artifact's weights have.

    Raises, when it is called:
        ArtifactError: if the model is not the one that was compressed.
    """
    if SURGERY not in manifest.files:
        return build
    path = directory / SURGERY
    surgeries = parse_surgeries(path.read_bytes(), str(path))
    return lambda: replay_on(build(), surgeries, path)
