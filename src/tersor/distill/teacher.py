"""What a teacher answers: asked each time, or once and kept on disk.

Shapes: `N` examples, `B` batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tersor.core.batch import Batch, select_output
from tersor.core.candidate import frozen_copy
from tersor.core.files import write_whole
from tersor.core.split import Split
from tersor.core.weights import tensors_hash
from tersor.distill.identity import model_hash
from tersor.errors import ConfigError, IntegrityError
from tersor.probe.outputs import Outputs
from tersor.train.metric import home_of
from tersor.train.parallel import join
from tersor.train.randomness import callers_kept, seed_all

OUTPUTS = "outputs"
_FEATURE = "feature:"
PROBED = 64  # examples that are read twice, to see whether they are drawn at random
ALONE = 16  # examples that are read one by one, to see whether they are padded


class Answers(NamedTuple):
    """The outputs that count `[B, …]`, and features by address."""

    outputs: Tensor
    features: dict[str, Tensor]


class Teacher(Protocol):
    """Answers batches, without gradients."""

    def __call__(self, batch: Batch) -> Answers:
        """Its answers to the batch, on the batch's device."""


class LiveTeacher:
    """Asks a model: itself, if it is frozen and where it is needed, else a frozen copy.

    Args:
        module: Stays as it is.
        output: Key or index of the output that counts.
        device: Where it is needed.
    """

    def __init__(self, module: nn.Module, output: str | int | None, device: torch.device) -> None:
        trains = any(part.training for part in module.modules()) or any(p.requires_grad for p in module.parameters())
        self.module, self.output = frozen_copy(module) if trains else module, output
        self.taps: Outputs | None = None
        self._to(device)

    def watch(self, addresses: Sequence[str]) -> None:
        """From now on these features are wanted too, see `tersor.probe.Outputs`."""
        self.taps = Outputs(self.module, addresses, detach=True) if addresses else None

    def __call__(self, batch: Batch) -> Answers:
        """Runs it."""
        self._to(next(iter(batch.tensors().values())).device)
        with torch.no_grad():
            if self.taps is None:
                return Answers(select_output(batch.call(self.module), self.output), {})
            with self.taps as taps:
                outputs = select_output(batch.call(self.module), self.output)
                return Answers(outputs, taps.take())

    def _to(self, device: torch.device) -> None:
        if home_of(self.module) == device:
            return
        self.module = frozen_copy(self.module).to(device)
        if self.taps is not None:
            self.watch(self.taps.addresses)


class CachedTeacher:
    """Looks answers up that were computed once for every example of a split.

    The file is named after the hash of teacher, examples and addresses, so another teacher never answers by mistake.
    Answers may differ from those to single batches in the last bits.

    Args:
        live: Whom to ask once.
        split: The training examples, none of them drawn at random: see `refuse_unsteady`.
        directory: Where the file is.
        device: Where the teacher is asked.
        batch_size: Examples at once.

    Raises:
        ConfigError: if features differ in shape from batch to batch, or have no row for each example.
        IntegrityError: if the file is damaged.
    """

    def __init__(
        self, live: LiveTeacher, split: Split, directory: Path, *, device: torch.device, batch_size: int = 256
    ) -> None:
        self.path = directory / f"teacher-{_fingerprint(live, split, device)}.safetensors"
        if join(device).size == 1:  # others may be writing it at this moment
            for scratch in directory.glob(f".{self.path.name}.*"):
                scratch.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if not self.path.exists():
            answers = _asked(live, split, device, batch_size)
            write_whole(self.path, save(answers, metadata={"sha256": tensors_hash(answers)}))
        self.tensors = self._read()

    def __call__(self, batch: Batch) -> Answers:
        """Takes the rows of the batch's examples."""
        if batch.positions is None:
            raise ConfigError("cached answers are for examples of the training split; leave mixup out, or the cache")
        device, rows = batch.positions.device, batch.positions.cpu()
        found = {name: tensor[rows].to(device) for name, tensor in self.tensors.items()}
        outputs = found.pop(OUTPUTS)
        return Answers(outputs, {name.removeprefix(_FEATURE): tensor for name, tensor in found.items()})

    def _read(self) -> dict[str, Tensor]:
        try:
            with safe_open(str(self.path), framework="pt") as stream:
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
                expected = (stream.metadata() or {}).get("sha256")
            if tensors_hash(tensors) != expected:
                raise ValueError("its content does not match its hash")
        except (SafetensorError, ValueError) as error:
            raise IntegrityError(f"{self.path} is damaged ({error}); remove it to ask the teacher again") from None
        return tensors


def _asked(live: LiveTeacher, split: Split, device: torch.device, batch_size: int) -> dict[str, Tensor]:
    """All answers, `[N, …]`."""
    parts: dict[str, list[Tensor]] = {}
    for batch in split.batches(batch_size):
        for name, tensor in _answered(live, batch, device).items():
            parts.setdefault(name, []).append(tensor)
    for name, tensors in parts.items():
        shapes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
        if len(shapes) > 1:
            raise ConfigError(
                f"{name.removeprefix(_FEATURE)!r} of the teacher has another shape in other batches ({shapes[0]}, "
                f"{shapes[1]}), as padded texts have; ask the teacher each time: leave the cache out"
            )
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _answered(live: LiveTeacher, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    outputs, features = live(batch.map(lambda value: value.to(device)))
    named = {OUTPUTS: outputs} | {_FEATURE + address: tensor for address, tensor in features.items()}
    for name, tensor in named.items():
        if not tensor.ndim or len(tensor) != len(batch):
            raise ConfigError(
                f"{name.removeprefix(_FEATURE)!r} of the teacher has shape {tuple(tensor.shape)} for {len(batch)} "
                "examples; only what has a row for each example can be kept: leave the cache out, or name another layer"
            )
    return {name: tensor.cpu().contiguous().clone() for name, tensor in named.items()}


def _fingerprint(live: LiveTeacher, split: Split, device: torch.device) -> str:
    """Hash of the teacher, of what is asked of it and of all examples in their order.

    A few of its answers belong to it: two modules with the same weights may compute different things.
    """
    tried = _answered(live, split.batch(range(min(ALONE, len(split)))), device)
    facts = [model_hash(live.module), sorted(tried), repr(live.output), tensors_hash(tried)]
    return hashlib.sha256(json.dumps(facts).encode() + b"".join(split.keys)).hexdigest()[:32]


def refuse_unsteady(split: Split) -> None:
    """Refuses examples whose answers cannot be kept.

    Raises:
        ConfigError: if the same examples, read twice, differ, or if an example's shape depends on its neighbours.
        NonFiniteError: if examples hold NaN or Inf.
    """
    count, read = min(PROBED, len(split)), []
    with callers_kept(torch.device("cpu")):
        for attempt in range(2):
            seed_all("cache", attempt)
            read.append(split.batch(range(count)))
    read[0].check_finite(f"the first batch of split {split.name!r}")
    first, second = (batch.tensors() for batch in read)
    if any(not torch.equal(value, second[name]) for name, value in first.items()):
        raise ConfigError(
            f"the examples of split {split.name!r} are drawn at random: read twice, they differ, so answers kept for "
            "the one would be wrong for the other; draw them once and for all, e.g. several views of each image as "
            "examples of their own, or leave the cache out"
        )
    if split.collate is None:
        return
    for position in range(min(ALONE, count)):
        for name, value in split.batch([position]).tensors().items():
            if value.shape[1:] != first[name].shape[1:]:
                raise ConfigError(
                    f"examples of split {split.name!r} are padded to the longest of their batch ({name!r} is "
                    f"{tuple(value.shape[1:])} alone and {tuple(first[name].shape[1:])} among others), so kept answers "
                    "would not fit: pad all to one length, or leave the cache out"
                )
