"""`tersor recipes`: list, show and copy presets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.core.files import write_whole
from tersor.errors import OutputDirectoryError
from tersor.recipes import preset_names, preset_text

recipes_app = typer.Typer(help="Presets: list, show, copy.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset's name.")]


@recipes_app.command("ls")
def list_presets() -> None:
    """List the presets with their first line."""
    for name in preset_names():
        typer.echo(f"{name:20} {preset_text(name).splitlines()[0].removeprefix('# ')}")


@recipes_app.command("show")
def show_preset(name: Name) -> None:
    """Print a preset's YAML."""
    typer.echo(preset_text(name), nl=False)


@recipes_app.command("cp")
def copy_preset(name: Name, destination: Annotated[Path, typer.Argument(help="The new file.")]) -> None:
    """Copy a preset to a file, to change it."""
    if destination.exists():
        raise OutputDirectoryError(f"{destination} already exists; choose another name")
    write_whole(destination, preset_text(name).encode())
    typer.echo(str(destination))
