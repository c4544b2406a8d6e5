"""From a freshly built model back to a pruned one: replays surgeries that were kept as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from tersor.core.artifact import SURGERY, Manifest, parse_surgeries
from tersor.core.surgery import Surgery
from tersor.errors import ArtifactError, SurgeryError
from tersor.graph import apply_surgery


def replay(module: nn.Module, surgeries: Sequence[Surgery]) -> nn.Module:
    """Applies surgeries to `module`, in place and in order; raises `SurgeryError` where one does not fit."""
    for surgery in surgeries:
        module = apply_surgery(module, surgery)
    return module


def pruned_builder(build: Callable[[], nn.Module], directory: Path, manifest: Manifest) -> Callable[[], nn.Module]:
    """Builds the module in the shapes that an artifact's weights have.

    Raises, when it is called:
        ArtifactError: if the model is not the one that was compressed.
    """
    if SURGERY not in manifest.files:
        return build
    surgeries = parse_surgeries((directory / SURGERY).read_bytes(), str(directory / SURGERY))

    def built() -> nn.Module:
        module = build()
        try:
            return replay(module, surgeries)
        except SurgeryError as error:
            raise ArtifactError(
                f"the surgery in {directory / SURGERY} does not fit the {type(module).__name__} that model() "
                f"returned: {error}. Build the model as it was before compression"
            ) from error

    return built
