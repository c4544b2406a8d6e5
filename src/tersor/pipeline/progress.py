"""Progress on standard error: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tersor.core.context import Progress as Show
from tersor.core.context import logger


@contextmanager
def shown() -> Iterator[Show]:
    """Yields a function `(label, done, total)`; each label gets its own bar."""
    if not sys.stderr.isatty():
        yield _log_ends
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, object] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done)  # type: ignore[arg-type]

        yield show


def _log_ends(label: str, done: int, total: int) -> None:
    if done == total:
        logger.info("%s: %d of %d", label, done, total)
