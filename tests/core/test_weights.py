from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.core.weights import fill, read_weights
from tersor.errors import ArtifactError, ModelError
from zoo import Cnn, Mlp, seeded, state_hash

Writer = Callable[[dict[str, Tensor], Path], None]


def legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, tuple[str, Writer]] = {
    "safetensors": ("w.safetensors", lambda state, path: save_file(state, path)),
    "pt": ("w.pt", lambda state, path: torch.save(state, path)),
    "pth": ("w.pth", lambda state, path: torch.save(state, path)),
    "legacy": ("w.pt", legacy),
}


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.evidence,)


@pytest.mark.parametrize("form", WRITERS)
def test_weights_come_back_bit_by_bit(form: str, tmp_path: Path) -> None:
    name, write = WRITERS[form]
    module = seeded(Cnn)
    write(module.state_dict(), tmp_path / name)
    read = read_weights(tmp_path / name)
    assert set(read) == set(module.state_dict())
    assert all(torch.equal(value, module.state_dict()[path]) for path, value in read.items())
    other = seeded(Cnn, seed=1).train()
    assert state_hash(other) != state_hash(module)
    assert fill(other, str(tmp_path / name)) is other
    assert state_hash(other) == state_hash(module)
    assert not other.training


@pytest.mark.parametrize("name", ["hostile.pt", "hostile.safetensors", "hostile.bin"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_hostile_file_is_refused_and_nothing_is_executed(name: str, new: bool, tmp_path: Path) -> None:
    evidence, file = tmp_path / "executed", tmp_path / name
    torch.save({"weight": torch.ones(2), "payload": Payload(evidence)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(ArtifactError, match=name):
        read_weights(file)
    with pytest.raises(ArtifactError):
        fill(nn.Linear(2, 2), file)
    assert not evidence.exists()
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False)  # the payload is live: a careless reader would have been caught
    assert evidence.exists()


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(form: str, share: float, tmp_path: Path) -> None:
    name, write = WRITERS[form]
    file = tmp_path / name
    write(seeded(Mlp).state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ArtifactError, match=name):
        read_weights(file)


@pytest.mark.parametrize("form", WRITERS)
def test_a_damaged_file_never_raises_anything_untyped(form: str, tmp_path: Path) -> None:
    name, write = WRITERS[form]
    file = tmp_path / name
    write(nn.Linear(3, 3).state_dict(), file)
    whole, chance = file.read_bytes(), random.Random(0)  # noqa: S311 - no secret
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.3 else whole)
        for _ in range(chance.choice([1, 3, 20])):
            if damaged:
                damaged[chance.randrange(min(len(damaged), chance.choice([40, 400, 10**6])))] = chance.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            read_weights(file)
        except ArtifactError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, torch.ones(2)], ids=str)
def test_a_file_that_holds_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match="state dict"):
        read_weights(tmp_path / "w.pt")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ArtifactError, match=str(path)):
            read_weights(path)


def test_weights_of_another_model_are_refused_naming_the_parameters(tmp_path: Path) -> None:
    save_file(seeded(Mlp).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"do not fit Mlp:.*last\.weight.*\[4, 16\].*\[9, 16\]"):
        fill(Mlp(classes=9), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"do not fit Cnn:.*stem\.weight"):
        fill(Cnn(), tmp_path / "w.safetensors")
