"""The run directory: which run it belongs to, and what each finished step left, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tersor.core.artifact import dump_surgeries, parse_surgeries
from tersor.core.candidate import Candidate
from tersor.core.files import disk_errors, write_whole
from tersor.core.quantization import QuantPlan
from tersor.core.report import StepRecord
from tersor.core.surgery import Surgery
from tersor.core.weights import tensors_hash
from tersor.errors import IntegrityError, OutputDirectoryError
from tersor.graph import replay

RUN = "run.json"
ARTIFACT = "artifact"
_MASK = "mask:"
_STATE = "state:"
_SURGERY = "surgery"
_PLAN = "plan"


class RunDirectory:
    """A run.

    `run.json` says whose it is, `stages/` holds what finished steps left, `work/` what an unfinished one needs to go
    on, `artifact/` is the result.
    """

    def __init__(self, path: Path, fingerprint: dict[str, str]) -> None:
        self.path = path
        self.fingerprint = fingerprint

    @property
    def artifact(self) -> Path:
        """Where the artifact is or will be."""
        return self.path / ARTIFACT

    @property
    def identity(self) -> str:
        """One hash for the whole run."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:32]

    def work(self, position: int) -> Path:
        """Where the step at `position` keeps what it needs to go on after an interruption; gone once it is done."""
        return self.unfinished / f"{position:02d}"

    @property
    def unfinished(self) -> Path:
        """What all steps keep while they are not done; nothing of it is needed once the last one is."""
        return self.path / "work"

    def claim(self) -> None:
        """Takes the directory for this run, or takes it up again.

        Raises:
            OutputDirectoryError: if it holds another run (saying what differs), something else, or is read-only.
        """
        marker = self.path / RUN
        if marker.exists():
            try:
                found = json.loads(marker.read_text())["fingerprint"]
                different = sorted(key for key in self.fingerprint if found.get(key) != self.fingerprint[key])
            except (ValueError, KeyError, AttributeError, TypeError):
                raise OutputDirectoryError(f"{marker} is damaged; remove {self.path} or choose another one") from None
            if different:
                raise OutputDirectoryError(
                    f"{self.path} holds another run: its {', '.join(different)} differ(s) from this call's; choose "
                    "another directory, or repeat the call as it was to resume"
                )
            return
        with disk_errors(self.path):
            if self.path.exists() and (not self.path.is_dir() or not all(map(_is_half_claimed, self.path.iterdir()))):
                raise OutputDirectoryError(
                    f"{self.path} is not empty and not a run of tersor; choose a new or empty directory"
                )
        write_whole(marker, (json.dumps({"fingerprint": self.fingerprint}, indent=2) + "\n").encode())

    def save_stage(self, position: int, candidate: Candidate) -> None:
        """Keeps a candidate without its simulation, which the step that made it can build from module and plan."""
        tensors = {_STATE + name: value.contiguous().clone() for name, value in candidate.module.state_dict().items()}
        tensors |= {_MASK + name: mask.to(torch.uint8) for name, mask in candidate.masks.items()}
        if candidate.surgeries:  # among the tensors, so that the hash covers them
            tensors[_SURGERY] = _as_tensor(dump_surgeries(candidate.surgeries))
        if candidate.plan is not None:
            tensors[_PLAN] = _as_tensor(candidate.plan.model_dump_json().encode())
        history = json.dumps([record.model_dump(mode="json") for record in candidate.history])
        metadata = {"history": history, "sha256": tensors_hash(tensors)}
        write_whole(self._stage(position), save(tensors, metadata=metadata))

    def load_stage(self, position: int, candidate: Candidate) -> Candidate | None:
        """The candidate that the step at `position` left, as yet without simulation; None if it never finished."""
        path = self._stage(position)
        if not path.exists():
            return None
        fresh = candidate.for_weights()
        try:
            with safe_open(str(path), framework="pt") as stream:
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
                metadata = stream.metadata() or {}
            history = json.loads(metadata["history"])
            if metadata["sha256"] != tensors_hash(tensors):
                raise ValueError("its content does not match its hash")
        except (SafetensorError, KeyError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged ({error}); remove it to repeat this step") from None
        surgeries: tuple[Surgery, ...] = ()
        if _SURGERY in tensors:
            surgeries = parse_surgeries(tensors[_SURGERY].numpy().tobytes(), str(path))
        plan = QuantPlan.model_validate_json(tensors[_PLAN].numpy().tobytes()) if _PLAN in tensors else None
        done = len(fresh.surgeries)
        if surgeries[:done] != fresh.surgeries:
            raise IntegrityError(f"{path} belongs to a model that was cut otherwise; remove it to repeat this step")
        module = replay(fresh.module, surgeries[done:])
        module.load_state_dict(
            {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
        )
        masks = {name.removeprefix(_MASK): value.bool() for name, value in tensors.items() if name.startswith(_MASK)}
        records = tuple(StepRecord.model_validate_json(json.dumps(record)) for record in history)
        return replace(fresh, module=module, masks=masks, surgeries=surgeries, plan=plan, history=records)

    def _stage(self, position: int) -> Path:
        return self.path / "stages" / f"{position:02d}.safetensors"


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _is_half_claimed(entry: Path) -> bool:
    """Whether this is what a process leaves that is killed while it takes the directory."""
    return entry.name.startswith(f".{RUN}.")
