from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from tersor.core.candidate import Candidate, frozen_copy
from tersor.core.files import disk_errors, sha256, whole_directory, write_whole
from tersor.core.target import Target
from tersor.errors import ArtifactError, ConfigError, OutputDirectoryError
from zoo import context_for, exported, normal

SmallDisk = Callable[..., Path]


def fill(destination: Path, sizes: dict[str, int], error: BaseException | None = None) -> None:
    """Writes files of these sizes into a whole directory, then fails if it is to."""
    with whole_directory(destination) as scratch:
        for name, size in sizes.items():
            (scratch / name).write_bytes(b"a" * size)
        if error is not None:
            raise error


def everything_in(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "er" / "artifact"
    with whole_directory(destination) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("content")
        assert not destination.exists()
        assert scratch.parent == destination.parent  # the same file system, so that the rename is atomic
    assert (destination / "inner" / "file").read_text() == "content"
    assert everything_in(tmp_path) == [
        "deep",
        "deep/er",
        *(f"deep/er/artifact{end}" for end in ("", "/inner", "/inner/file")),
    ]
    assert destination.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, ConfigError])
def test_an_error_inside_leaves_nothing_and_comes_through(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error, match="inside"):
        fill(tmp_path / "artifact", {"half": 10}, error("inside"))
    assert everything_in(tmp_path) == []


def test_an_error_of_the_system_inside_is_typed(tmp_path: Path) -> None:
    with pytest.raises(OutputDirectoryError, match="artifact: No space left") as caught:
        fill(tmp_path / "artifact", {"half": 10}, OSError(28, "No space left on device"))
    assert isinstance(caught.value, ArtifactError)
    assert isinstance(caught.value, OSError)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("directory", [True, False])
def test_what_is_there_already_is_not_touched(directory: bool, tmp_path: Path) -> None:
    destination = tmp_path / "artifact"
    kept = destination / "mine" if directory else destination
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    entered = False
    with pytest.raises(OutputDirectoryError, match="already exists"), whole_directory(destination):
        entered = True
    assert not entered
    assert kept.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="file"), whole_directory(tmp_path / "file" / "artifact"):
        pass
    with pytest.raises(OutputDirectoryError, match="file"):
        write_whole(tmp_path / "file" / "x", b"")


def test_a_file_is_replaced_in_one_piece(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_whole(file, b"old")
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert everything_in(tmp_path) == ["deep", "deep/file"]


def test_the_hash_is_sha256_of_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_errors_keep_their_type_when_they_are_typed_already(tmp_path: Path) -> None:
    with pytest.raises(OutputDirectoryError, match=r"^as it was$"), disk_errors(tmp_path):
        raise OutputDirectoryError("as it was")


# --- a disk that is really full, or really read-only


def test_a_full_disk_leaves_no_half_directory(small_disk: SmallDisk) -> None:
    place = small_disk(64)
    with pytest.raises(OutputDirectoryError, match="No space left"):
        fill(place / "artifact", {"small": 1000, "large": 200_000})
    assert everything_in(place) == []
    fill(place / "artifact", {"file": 40_000})  # the space is free again
    assert everything_in(place) == ["artifact", "artifact/file"]


def test_a_full_disk_keeps_the_old_file(small_disk: SmallDisk) -> None:
    place = small_disk(64)
    write_whole(place / "state", b"old")
    with pytest.raises(OutputDirectoryError, match="No space left"):
        write_whole(place / "state", b"a" * 200_000)
    assert (place / "state").read_bytes() == b"old"
    assert everything_in(place) == ["state"]


def test_a_read_only_place_is_refused(small_disk: SmallDisk) -> None:
    place = small_disk(64)
    write_whole(place / "state", b"old")
    assert small_disk(64, "ro") == place
    for where in ("artifact", "deep/artifact"):
        with pytest.raises(OutputDirectoryError, match="Read-only"), whole_directory(place / where):
            pass
    with pytest.raises(OutputDirectoryError, match="Read-only"):
        write_whole(place / "state", b"new")
    assert everything_in(place) == ["state"]
    assert (place / "state").read_bytes() == b"old"


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_every_runtime_reports_a_full_disk_as_such(runtime: str, small_disk: SmallDisk) -> None:
    place = small_disk(64)
    model = nn.Sequential(nn.Linear(12, 4000), nn.Linear(4000, 2)).eval()  # 240 kB of weights
    context = context_for(model, normal(4, 12), Target(runtime, threads=1))
    with pytest.raises(OutputDirectoryError), whole_directory(place / "artifact") as scratch:
        exported(Candidate(frozen_copy(model)), context, scratch)
    assert everything_in(place) == []
