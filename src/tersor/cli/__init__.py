"""The command line."""

from tersor.cli.main import main

__all__ = ["main"]
