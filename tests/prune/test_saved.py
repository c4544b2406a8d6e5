"""Pruned models on disk: whole or not at all, and back again from the model as it was built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core.candidate import Candidate
from tersor.errors import ArtifactError, IntegrityError, ModelError, OutputDirectoryError
from tersor.prune import depth, read_pruned, structured, write_pruned
from zoo import MLP_DATA, Mlp, normal, seeded

X = normal(4, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.wide(x).relu())


def build() -> nn.Module:
    return nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(8, 3))


@pytest.fixture
def pruned(tmp_path: Path) -> Candidate:
    """A model without a block and half of the rest, and in `tmp_path / "pruned"` its files."""
    shallow = depth(seeded(build), X, amount=0.3)
    thin = structured(shallow.model, X, amount=0.5)
    surgeries = (shallow.surgery, thin.surgery)
    write_pruned(tmp_path / "pruned", thin.model, surgeries)
    return Candidate(thin.model, surgeries=surgeries)


def test_blocks_and_units_come_back(pruned: Candidate, tmp_path: Path) -> None:
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == ["surgery.json", "weights.safetensors"]
    found = read_pruned(str(tmp_path / "pruned"), build)
    assert found.surgeries == pruned.surgeries
    assert not found.module.training
    with torch.no_grad():
        assert torch.equal(found.module(X), pruned.module(X))


def test_a_directory_that_exists_is_left_alone(pruned: Candidate, tmp_path: Path) -> None:
    before = (tmp_path / "pruned/surgery.json").read_bytes()
    with pytest.raises(OutputDirectoryError, match="already exists"):
        write_pruned(tmp_path / "pruned", pruned.module, ())
    assert (tmp_path / "pruned/surgery.json").read_bytes() == before


@pytest.mark.parametrize("name", ["surgery.json", "weights.safetensors"])
def test_a_missing_file_is_named(pruned: Candidate, tmp_path: Path, name: str) -> None:
    (tmp_path / "pruned" / name).unlink()
    with pytest.raises(ArtifactError, match=rf"pruned has no {name}; expected the directory that tersor prune --out"):
        read_pruned(tmp_path / "pruned", build)


def test_both_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no weights\.safetensors and no surgery\.json"):
        read_pruned(tmp_path, build)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "truncated or no list of surgeries"),
        (lambda text: "{}", "truncated or no list|not a valid surgery"),
        (lambda text: "[[]]", "truncated or no list"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "upgrade tersor"),
        (lambda text: text.replace('"dim": 0', '"dim": -1'), "not a valid surgery: .*dim"),
        (lambda text: text.replace('"path"', '"__class__"'), "not a valid surgery"),
    ],
)
def test_a_damaged_surgery_is_refused(
    pruned: Candidate, tmp_path: Path, damage: Callable[[str], str], said: str
) -> None:
    file = tmp_path / "pruned/surgery.json"
    changed = damage(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(ArtifactError, match=said):
        read_pruned(tmp_path / "pruned", build)


def test_damaged_weights_are_refused(pruned: Candidate, tmp_path: Path) -> None:
    file = tmp_path / "pruned/weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged"):
        read_pruned(tmp_path / "pruned", build)


def test_weights_of_another_pruning_are_refused(pruned: Candidate, tmp_path: Path) -> None:
    other = structured(seeded(build), X, amount=0.25)
    write_pruned(tmp_path / "other", other.model, [other.surgery])
    (tmp_path / "other/weights.safetensors").replace(tmp_path / "pruned/weights.safetensors")
    with pytest.raises(ModelError, match=r"do not fit Sequential: .* The two files of .*pruned must be of one pruning"):
        read_pruned(tmp_path / "pruned", build)


def test_another_model_is_refused(pruned: Candidate, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not fit the Mlp that was built: .*as it was before compression"):
        read_pruned(tmp_path / "pruned", Mlp)
    with pytest.raises(ArtifactError, match="does not fit the Sequential that was built"):
        read_pruned(tmp_path / "pruned", lambda: pruned.module)


def test_an_index_out_of_range_is_refused(tmp_path: Path) -> None:
    report = structured(seeded(Mlp), MLP_DATA, amount=0.5)
    write_pruned(tmp_path / "pruned", report.model, [report.surgery])
    file = tmp_path / "pruned/surgery.json"
    content = json.loads(file.read_text())
    content[0]["cuts"][0]["kept"][-1] = 10**9
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="must be ascending indices below 16"):
        read_pruned(tmp_path / "pruned", Mlp)


def test_the_surgery_is_read_as_data_only(pruned: Candidate, tmp_path: Path) -> None:
    (tmp_path / "pruned/surgery.json").write_bytes(b"\x80\x04\x95")  # the beginning of a pickle
    with pytest.raises(IntegrityError, match="truncated"):
        read_pruned(tmp_path / "pruned", build)
