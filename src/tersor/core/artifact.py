"""The artifact: a directory whose manifest says what every file is. Reading it executes no code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError

from tersor.core.config import Config
from tersor.core.files import sha256
from tersor.core.signature import Signature
from tersor.core.surgery import SCHEMA as SURGERY_VERSION
from tersor.core.surgery import Surgery
from tersor.core.target import Target
from tersor.errors import ArtifactError, ConfigError, IntegrityError

MANIFEST = "manifest.json"
SURGERY = "surgery.json"
SCHEMA_VERSION = 2
PLAIN_SCHEMA = 1  # 2: a surgery must be replayed before the weights fit; whatever does not need that stays readable


class FileEntry(Config):
    """One file of the artifact."""

    sha256: str
    size_bytes: int


class Manifest(Config):
    """What an artifact is: enough to check it, load it and feed it."""

    schema_version: int = PLAIN_SCHEMA
    name: str
    target: Target
    signature: Signature
    precision: str
    class_names: list[str]
    preprocessing: str
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    cpu_flags: list[str]
    weight_bits: int | None = Field(
        default=None, description="width of integer weights; 7 where int8 kernels might overflow"
    )
    files: dict[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Writes `manifest.json`, sealed with the hash of its own content."""
        content = self.model_dump(mode="json")
        sealed = {**content, "digest": _digest(content)}
        (directory / MANIFEST).write_text(json.dumps(sealed, indent=2) + "\n")


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """An entry for every file in `directory`, by its path relative to it."""
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256=sha256(path), size_bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest alone.

    Raises:
        IntegrityError: if it is missing, truncated, changed, or of a newer schema.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise IntegrityError(f"{directory} is not an artifact: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text())
        digest = content.pop("digest")
        newer = content["schema_version"] > SCHEMA_VERSION
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path} is truncated or no manifest ({type(error).__name__}: {error})") from None
    if newer:
        raise IntegrityError(
            f"{path} has schema version {content['schema_version']}, this tersor reads up to {SCHEMA_VERSION}: "
            "upgrade tersor"
        )
    if _digest(content) != digest:
        raise IntegrityError(f"{path} was changed after it was written: its digest does not match its content")
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except (ValidationError, ConfigError) as error:
        raise IntegrityError(f"{path} is not a valid manifest: {error}") from None


def verify(directory: Path) -> Manifest:
    """Checks every file of an artifact against the manifest.

    Raises:
        IntegrityError: naming the first file that is missing, truncated or changed, or that lies outside.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        relative, path = PurePosixPath(name), directory / name
        linked = any((directory / part).is_symlink() for part in (relative, *relative.parents[:-1]))
        if relative.is_absolute() or ".." in relative.parts or "\\" in name or linked:
            raise IntegrityError(f"{directory}: the manifest names {name!r}, which lies outside the artifact")
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; the artifact is incomplete: copy it again")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise IntegrityError(f"{path} has {size} bytes, expected {entry.size_bytes}: truncated or changed")
        if sha256(path) != entry.sha256:
            raise IntegrityError(f"{path} was changed: its SHA-256 does not match the manifest")
    return manifest


def check_attachments(attachments: Mapping[str, str | Path]) -> dict[str, Path]:
    """Files that travel along in an artifact: where they will lie in it, and where they are now.

    They lie in directories without a dot, such as `tokenizer/vocab.txt`: the artifact's own files are all at its top
    and have one, so that no name can be taken twice.

    Raises:
        ConfigError: if a place is absolute, leads outside, is not in such a directory, is both file and directory, or
            its file does not exist.
    """
    checked: dict[str, Path] = {}
    for name, file in attachments.items():
        place, path = PurePosixPath(name), Path(file)
        outside = place.is_absolute() or ".." in place.parts or str(place) != name or bool(set(name) & set("\\:\0"))
        if outside or len(place.parts) < 2 or "." in place.parts[0]:
            raise ConfigError(
                f"attachments: expected a relative place in a directory, such as 'tokenizer/vocab.txt', got {name!r}"
            )
        if not path.is_file():
            raise ConfigError(f"attachments: {name!r} is to be a copy of {path}, which is not a file")
        checked[name] = path
    folders = {str(parent) for name in checked for parent in PurePosixPath(name).parents}
    for name in sorted(folders & set(checked)):
        raise ConfigError(f"attachments: {name!r} cannot be both a file and a directory")
    return checked


def attach(directory: Path, attachments: Mapping[str, Path]) -> None:
    """Copies what `check_attachments` allowed into an artifact that has no manifest yet.

    Raises:
        ArtifactError: if a file is gone by now, or its place in the artifact is taken.
    """
    for name, file in attachments.items():
        place = directory / name
        if place.exists():
            raise ArtifactError(f"attachments: the artifact has a file {name!r} of its own; choose another name")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            raise ArtifactError(f"attachments: {file} was there when the task was made, but is gone now")
        shutil.copyfile(file, place)


def dump_surgeries(surgeries: Sequence[Surgery]) -> bytes:
    """The content of `surgery.json`: a list, in the order of application."""
    return (json.dumps([surgery.model_dump(mode="json") for surgery in surgeries]) + "\n").encode()


def parse_surgeries(content: bytes | str, where: str) -> tuple[Surgery, ...]:
    """Reads what `dump_surgeries` wrote; data only, nothing is executed.

    Raises:
        IntegrityError: naming `where`, if it is no list of surgeries, or of a newer form.
    """
    try:
        data = json.loads(content)
        if not isinstance(data, list):
            raise TypeError(f"expected a list, got {type(data).__name__}")
        newest = max((int(item["version"]) for item in data), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{where} is truncated or no list of surgeries ({type(error).__name__}: {error})"
        ) from None
    if newest > SURGERY_VERSION:
        raise IntegrityError(f"{where} has version {newest}, this tersor reads up to {SURGERY_VERSION}: upgrade tersor")
    try:
        return tuple(Surgery.from_json(json.dumps(item)) for item in data)
    except ConfigError as error:
        raise IntegrityError(f"{where} is not a valid surgery: {str(error)[:300]}") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
