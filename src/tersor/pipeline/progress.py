"""Progress on standard error: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tersor.core.context import NO_FACTS, logger
from tersor.core.context import Progress as Show

COLUMNS = (TextColumn("{task.fields[facts]}"), TimeRemainingColumn())


@contextmanager
def shown() -> Iterator[Show]:
    """Yields a function `(label, done, total)`; each label gets its own bar."""
    if not sys.stderr.isatty():
        yield _log_ends
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *COLUMNS)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, object] = {}

        def show(label: str, done: int, total: int, facts: Mapping[str, float] = NO_FACTS, /) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, facts="")
            bars.update(tasks[label], completed=done, total=total, facts=told(facts))  # type: ignore[arg-type]

        yield show


def told(facts: Mapping[str, float]) -> str:
    """Facts on one line: `loss 0.412, 310 examples/s`."""
    return ", ".join(
        f"{value:,.0f} {name}" if name.endswith("/s") else f"{name} {value:.4g}" for name, value in facts.items()
    )


def _log_ends(label: str, done: int, total: int, facts: Mapping[str, float] = NO_FACTS, /) -> None:
    if done == total:
        logger.info("%s: %d of %d%s", label, done, total, f" ({told(facts)})" if facts else "")
