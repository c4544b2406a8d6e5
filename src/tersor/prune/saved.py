"""Pruned models on disk: `weights.safetensors`, and in `surgery.json` how to get from the model to these weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import nn

from tersor.core.artifact import SURGERY, dump_surgeries, parse_surgeries
from tersor.core.candidate import Candidate
from tersor.core.files import whole_directory
from tersor.core.surgery import Surgery
from tersor.core.weights import fill
from tersor.errors import ArtifactError, ModelError, SurgeryError
from tersor.graph import replay

WEIGHTS = "weights.safetensors"


def write_pruned(directory: str | Path, model: nn.Module, surgeries: Sequence[Surgery]) -> None:
    """Writes a pruned model, both files or none; tied weights are written under each of their names.

    Args:
        directory: New; its parents are made.
        model: After the surgeries.
        surgeries: In the order of application.

    Raises:
        OutputDirectoryError: if the directory exists, or cannot be written.
    """
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    with whole_directory(Path(directory)) as scratch:
        (scratch / WEIGHTS).write_bytes(save(state))
        (scratch / SURGERY).write_bytes(dump_surgeries(surgeries))


def read_pruned(directory: str | Path, model: Callable[[], nn.Module]) -> Candidate:
    """Reads what `write_pruned` or `tersor prune --out` wrote; executes no code but yours.

    Hand the candidate to `tersor.compress`: then the artifact holds these surgeries along with its own.

    Args:
        directory: With both files.
        model: Builds the module as it was before pruning.

    Raises:
        IntegrityError: if the surgery is damaged.
        ArtifactError: if a file is missing or damaged, or the surgery does not fit the model.
        ModelError: if the weights do not fit the pruned model.
    """
    folder = Path(directory)
    missing = [name for name in (WEIGHTS, SURGERY) if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{folder} has no {' and no '.join(missing)}; expected the directory that tersor prune --out wrote, with "
            f"{WEIGHTS} and {SURGERY}"
        )
    surgeries = parse_surgeries((folder / SURGERY).read_bytes(), str(folder / SURGERY))
    pruned = replay_on(model(), surgeries, folder / SURGERY)
    try:
        return Candidate(fill(pruned, folder / WEIGHTS), surgeries=surgeries)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}. The two files of {folder} must be of one pruning") from None


def replay_on(module: nn.Module, surgeries: Sequence[Surgery], path: Path) -> nn.Module:
    """`replay` of what stood at `path`, in place.

    Raises:
        ArtifactError: if the model is not the one that was pruned.
    """
    try:
        return replay(module, surgeries)
    except SurgeryError as error:
        raise ArtifactError(
            f"the surgery in {path} does not fit the {type(module).__name__} that was built: {error}. Build the model "
            "as it was before compression"
        ) from error
