"""Opens the database of a trial store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from tersor.errors import ConfigError, RuntimeUnavailableError

PATIENCE = 60.0  # seconds to wait for another process's write


def connect(location: Path | str, *, durable: bool = True) -> RDBStorage:
    """Optuna's storage at a SQLite file, which is made if there is none, or at a URL.

    Args:
        location: Path or URL.
        durable: Whether what is written to a file is on the disk when a call returns; a file that is flushed as a
            whole once it is done needs none of that.

    Raises:
        ConfigError: if the URL is none, or one of SQLite.
        RuntimeUnavailableError: if the database's driver is not installed.
    """
    if isinstance(location, Path):
        # A path has characters that mean something else in a URL, so that the URL names no file.
        kind = _Durable if durable else _Hasty
        opened = partial(sqlite3.connect, location, timeout=PATIENCE, check_same_thread=False, factory=kind)
        return RDBStorage("sqlite:///file", engine_kwargs={"creator": opened})
    shown = shown_url(location)
    try:
        return RDBStorage(location)
    except (ImportError, NoSuchModuleError) as error:
        raise RuntimeUnavailableError(
            f"{shown}: the driver of this database is not installed ({error.__cause__ or error}); for PostgreSQL: "
            "pip install 'psycopg[binary]'"
        ) from error


def shown_url(url: str) -> str:
    """A database's URL as it may be shown, without its password.

    Raises:
        ConfigError: if it is none, or one of SQLite.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "trial store: the URL cannot be read; expected one such as 'postgresql+psycopg://user@host/database'"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        raise ConfigError("trial store: for SQLite give the path of the file, not a URL")
    return parsed.render_as_string(hide_password=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna from announcing studies on standard error."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class _Durable(sqlite3.Connection):
    """A connection whose commits are on the disk when they return."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.execute("PRAGMA synchronous = FULL")


class _Hasty(sqlite3.Connection):
    """A connection that leaves it to the system when commits reach the disk."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.execute("PRAGMA synchronous = OFF")
