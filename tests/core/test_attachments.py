"""Files that travel along in an artifact: where they may lie, and that they are hashed there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor.core.artifact import MANIFEST, attach, check_attachments, describe_files
from tersor.core.files import sha256
from tersor.core.task import Task
from tersor.errors import ArtifactError, ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "words.txt"
    found.write_text("one two\n")
    return found


@pytest.mark.parametrize(
    "name",
    ["words.txt", "", ".", "/etc/words.txt", "../words.txt", "a/../../words.txt", "a/./words.txt", "a//words.txt",
     "a\\words.txt", "C:/words.txt", "a/words.txt/", "model.onnx/words.txt", "a/\0"],
)  # fmt: skip
def test_places_outside_or_among_the_artifacts_own_files_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a relative place in a directory"):
        check_attachments({name: file})


def test_a_file_that_is_not_there_is_named_before_work_begins(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match=f"copy of {path}, which is not a file"):
            Task(report=torch.zeros(4, 2), attachments={"a/words.txt": path})


def test_no_place_is_both_file_and_directory(file: Path) -> None:
    with pytest.raises(ConfigError, match="'a/b' cannot be both"):
        check_attachments({"a/b": file, "a/b/c": file})


def test_copies_are_described_by_their_path(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(file)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / MANIFEST).write_text("{}")
    attach(artifact, check_attachments({"a/words.txt": str(file), "a/b/link.txt": link, f"a/{MANIFEST}": file}))
    described = describe_files(artifact)
    assert list(described) == ["a/b/link.txt", f"a/{MANIFEST}", "a/words.txt"]
    assert {entry.sha256 for entry in described.values()} == {sha256(file)}
    assert not (artifact / "a/b/link.txt").is_symlink()


def test_files_that_vanish_and_places_that_are_taken(file: Path, tmp_path: Path) -> None:
    checked = check_attachments({"a/words.txt": file})
    attach(tmp_path / "artifact", checked)
    with pytest.raises(ArtifactError, match=r"a file 'a/words\.txt' of its own"):
        attach(tmp_path / "artifact", checked)
    file.unlink()
    with pytest.raises(ArtifactError, match="gone now"):
        attach(tmp_path / "other", checked)


def test_tasks_have_none_by_default() -> None:
    assert Task(report=torch.zeros(4, 2)).attachments == {}
