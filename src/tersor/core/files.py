"""Writing to disk without halves: everything appears complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tersor.errors import OutputDirectoryError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """Yields a scratch directory beside `destination` that becomes it at the end.

    Every file is flushed to disk before the rename. On any error the scratch directory is removed and
    `destination` was never touched.

    Raises:
        OutputDirectoryError: if the disk is full, the place is read-only, or `destination` already exists.
    """
    if destination.exists():
        raise OutputDirectoryError(f"{destination} already exists; choose another directory or remove it")
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        with disk_errors(destination):
            yield scratch
            for path in sorted(scratch.rglob("*"), reverse=True):
                flush(path)
            flush(scratch)
            scratch.chmod(0o755)
            scratch.rename(destination)
            flush(destination.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one piece: scratch file, flush, rename."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(scratch).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(scratch).unlink()
            raise
        flush(path.parent)


def flush(path: Path) -> None:
    """Makes the system write a file or directory to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turns the system's errors about `place` into `OutputDirectoryError`; those about other files stay as they are."""
    try:
        yield
    except OutputDirectoryError:
        raise
    except OSError as error:
        if not _concerns(error, place):
            raise
        raise OutputDirectoryError(
            f"cannot write {place}: {error.strerror or error}; nothing was left behind. Free space or choose another "
            "directory, then run the same call again: finished steps are kept"
        ) from error


def _concerns(error: OSError, place: Path) -> bool:
    """Whether an error is about writing `place`, and not e.g. about a file that the caller's data reads."""
    if not isinstance(error.filename, str | bytes):
        return error.errno in _DISK
    named, beside = Path(os.fsdecode(error.filename)).absolute(), place.absolute().parent
    return named.is_relative_to(beside) or beside.is_relative_to(named)
