"""What every result file records about where it was measured."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tersor.core.machine import environment


def describe(*, threads: int, seed: int, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine, versions and date, with the versions of the peers."""
    facts: dict[str, Any] = environment(threads=threads, seed=seed).model_dump(mode="json")
    for package in packages:
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    return facts
