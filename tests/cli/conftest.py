from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.commands import Command, Said
from tersor.cli import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`tersor …` in this process."""
    logger = logging.getLogger("tersor")
    level = logger.level

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["tersor", *(str(argument) for argument in arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Said(code, *capfd.readouterr())

    yield run
    logger.setLevel(level)


@pytest.fixture
def in_problem(monkeypatch: pytest.MonkeyPatch, problem: Any) -> Iterator[None]:
    """The directory of the problem's module is the current one; what is imported from it is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(problem.directory)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == problem.directory:
            del sys.modules[name]
